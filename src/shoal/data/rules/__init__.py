"""Heuristic rules: small functions that keep a document (None) or say why not; each names its source.

A rule reads, it never rewrites, and costs little: rules run on everything, models only on what is left.
"""

from __future__ import annotations

from shoal.data.document import Document, Rule
from shoal.data.rules import c4, code, fineweb, gopher, repetition
from shoal.errors import ConfigError

RULESETS: dict[str, tuple[Rule, ...]] = {
    "gopher": (*gopher.RULES, *repetition.RULES),
    "c4": c4.RULES,
    "fineweb": fineweb.RULES,
    "code": code.RULES,
    "none": (),
}
# `auto`: code rules for code; for text Gopher's, which fit every register. C4 and FineWeb fit web pages.
CHOICES = ("auto", *RULESETS)


def rules_for(names: tuple[str, ...]) -> dict[str, tuple[Rule, ...]]:
    """Rules by the kind of document (`text`, `code`) for a choice of rule sets. Raises ConfigError for other names."""
    for name in names:
        if name not in CHOICES:
            raise ConfigError("rules", f"must be of {', '.join(CHOICES)}, got {name!r}")
    text = [rule for name in names if name != "code" for rule in RULESETS["gopher" if name == "auto" else name]]
    code_rules = RULESETS["code"] if {"auto", "code"} & set(names) else ()
    return {"text": tuple(text), "code": code_rules}


def judge(document: Document, rules: tuple[Rule, ...]) -> str | None:
    """The first reason to drop a document, or None."""
    for rule in rules:
        reason = rule(document)
        if reason is not None:
            return reason
    return None
