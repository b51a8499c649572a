"""Documents that hold evaluation items are found, with recall and precision stated."""

from __future__ import annotations

import gzip
import json
import unicodedata

import pytest
from tests.data import texts
from tests.data.texts import document

from shoal.data.contamination import contaminated, fingerprints, load_evaluations
from shoal.errors import FileError

PROBLEM = '''def largest_gap(values):
    """Find the largest distance between neighbours after sorting the given values."""
    ordered = sorted(set(values))
    best_gap_so_far = 0
    for left, right in zip(ordered, ordered[1:]):
        best_gap_so_far = max(best_gap_so_far, right - left)
    return best_gap_so_far
'''
QUESTION = (
    "Natalia packs 48 clips for her friends in the morning and half as many in the afternoon; how many clips did she "
    "pack altogether on that day?"
)


@pytest.fixture
def evaluations(tmp_path):
    path = tmp_path / "eval.jsonl.gz"
    rows = [
        {"question": QUESTION, "answer": "72"},
        {"prompt": PROBLEM, "tests": ["assert largest_gap([1, 9, 4]) == 5"]},
    ]
    rows += [{"question": "Which ten words stand in this rather short question here?"}, {"question": "Too short."}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return load_evaluations((path,))


def test_text_that_quotes_an_item_is_found(evaluations):
    clean = texts.english()[40:140]
    assert [text for text in clean if contaminated(document(text), evaluations)] == []  # precision 1
    planted = [f"{text[:500]} {QUESTION.upper()} {text[500:]}" for text in clean]
    assert all(contaminated(document(text), evaluations) for text in planted)  # recall 1
    words = QUESTION.split()
    assert contaminated(document(" ".join(words[:13])), evaluations) == "contaminated: 13 words of an evaluation item"
    assert contaminated(document(" ".join(words[:12])), evaluations) is None
    short = "He asked: which ten words stand in this rather short question here? Nobody knew."
    assert contaminated(document(short), evaluations) == "contaminated: 10 words of an evaluation item"
    assert contaminated(document("Too short. " + clean[0]), evaluations) is None


def test_code_that_holds_an_item_is_found(evaluations):
    modules = list(texts.code().values())
    assert [text for text in modules if contaminated(document(text, "code"), evaluations)] == []
    indented = "".join(f"    {line}\n" for line in PROBLEM.splitlines())
    planted = [f"{text}\nclass Solution:\n{indented}\n" for text in modules]
    assert all(contaminated(document(text, "code"), evaluations) for text in planted)
    part = "\n".join(PROBLEM.splitlines()[:3])  # half of the telling lines
    assert contaminated(document(part, "code"), evaluations) is None


def test_an_item_is_spelled_as_documents_are():
    """Documents are in NFC and without zero-width characters when they are compared, whatever the item was in."""
    plain = "Où se trouve le café préféré de la célèbre poétesse née à Liège en été, près du musée de la forêt?"
    item = unicodedata.normalize("NFD", plain).replace("musée", "mu\u200bsée")
    for spelled in (plain, unicodedata.normalize("NFD", plain), plain.replace("célèbre", "cé\u200blèbre")):
        assert contaminated(document(plain), fingerprints([[spelled]])) is not None
    assert contaminated(document(plain), fingerprints([[item]])) is not None


def test_a_licence_in_comments_is_no_item():
    head = "".join(f"# Licensed under the terms that stand in file number {i} of this project\n" for i in range(12))
    known = fingerprints([[head + "x_of_this_module = 1\ny_of_this_module = 2\n"]])
    assert contaminated(document(head + "def something_else():\n    return 5\n", "code"), known) is None


def test_bad_evaluation_files(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"question": "a"}\nbroken\n')
    with pytest.raises(FileError, match=r"eval\.jsonl: line 2"):
        load_evaluations((path,))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FileError, match="holds no evaluation items"):
        load_evaluations((tmp_path / "empty.jsonl",))
