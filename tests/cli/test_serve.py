"""Which model fills gaps beside the served one."""

from __future__ import annotations

import pytest

from shoal import hub
from shoal.cli.console import DEFAULT_MODEL
from shoal.cli.serve import _code_model
from shoal.errors import UnknownModelError


@pytest.mark.parametrize(
    ("chosen", "served", "name"),
    [
        (None, DEFAULT_MODEL, "shoal-code"),
        (None, "./mine.gguf", None),
        ("none", DEFAULT_MODEL, None),
        ("code", "./mine.gguf", "code"),
    ],
)
def test_the_code_model_stands_beside_the_default_one(chosen, served, name):
    assert _code_model(chosen, served) == (name, name and hub.resolve("code"))


def test_an_unknown_one_is_an_error():
    with pytest.raises(UnknownModelError, match="no/such"):
        _code_model("no/such", DEFAULT_MODEL)
