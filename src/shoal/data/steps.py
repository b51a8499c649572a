"""The standard pipeline, step by step: generators over documents, each with a name under which it is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shoal.data import language, licences, pii
from shoal.data.contamination import contaminated, load_evaluations
from shoal.data.document import Document, OnReject, Rule, Step, rejected
from shoal.data.normalise import normalise
from shoal.data.recipe import Recipe
from shoal.data.rules import judge, rules_for
from shoal.data.views import rewrite

Steps = Callable[[Recipe], list[tuple[str, Step]]]  # how a pipeline is described


def filtering(name: str, rule: Rule) -> Step:
    """A step that drops what `rule` gives a reason to drop."""

    def step(documents: Iterable[Document], on_reject: OnReject) -> Iterator[Document]:
        for document in documents:
            reason = rule(document)
            if reason is None:
                yield document
            else:
                on_reject(rejected(document, name, reason))

    return step


def editing(edit: Callable[[Document], None]) -> Step:
    """A step that changes every document in place and drops none."""

    def step(documents: Iterable[Document], on_reject: OnReject) -> Iterator[Document]:
        for document in documents:
            edit(document)
            yield document

    return step


def standard_steps(recipe: Recipe) -> list[tuple[str, Step]]:
    """normalise → licence → language → quality → contamination → privacy, as far as the recipe asks for them."""
    rules = rules_for(recipe.rules)
    roots = {source.metadata()["source"]: source.path for source in recipe.sources}
    names = sorted(roots, key=len, reverse=True)

    def clean(document: Document) -> None:
        rewrite(document, normalise(document.text, document.metadata["kind"]))

    def licence(document: Document) -> str | None:
        # By the path: a row may name a source of its own.
        path = document.metadata["path"]
        name = next(one for one in names if path == one or path.startswith(f"{one}/"))
        root, inside = roots[name], path[len(name) + 1 :]
        licences.provenance(document, root / inside if inside else root, root)
        found = document.metadata.get("licence")
        if recipe.licences == "any" or licences.is_permissive(found):
            return None
        return f"licence: {found} is not permissive" if found else "licence: unknown"

    def spoken(document: Document) -> str | None:
        meta = document.metadata
        if meta["kind"] != "code" and "language" not in meta:
            meta["language"], document.attributes["language_confidence"] = language.identify(document.text)
        wanted = not recipe.languages or meta.get("language") in recipe.languages
        return None if wanted else f"language: {meta.get('language')}"

    def quality(document: Document) -> str | None:
        if not document.text.strip():
            return "empty"
        return judge(document, rules["code" if document.metadata["kind"] == "code" else "text"])

    def private(document: Document) -> None:
        text, counts = pii.mask(document.text)
        rewrite(document, text)
        document.attributes["masked"] = dict(counts)

    steps: list[tuple[str, Step]] = [
        ("normalise", editing(clean)),
        ("licence", filtering("licence", licence)),
    ]
    if recipe.identify_language:
        steps.append(("language", filtering("language", spoken)))
    steps.append(("quality", filtering("quality", quality)))
    if recipe.evaluations:
        evaluations = load_evaluations(tuple(Path(path) for path in recipe.evaluations))
        steps.append(("contamination", filtering("contamination", lambda one: contaminated(one, evaluations))))
    if recipe.mask_pii:
        steps.append(("privacy", editing(private)))
    return steps
