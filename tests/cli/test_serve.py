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
    assert _code_model(chosen, served, "mine") == (name, name and hub.resolve("code"))


def test_it_is_called_by_its_folder_and_no_client_sees_where_that_is(tmp_path):
    folder = tmp_path / "mine"
    folder.symlink_to(hub.resolve("code"))
    assert _code_model(str(folder), "./other.gguf", "other") == (hub.resolve("code").name, folder)


def test_two_models_need_two_names(shoal):
    failed = shoal("serve", "code", "--code", "code", "--port", "0")
    assert (failed.code, failed.error) == (
        2,
        "code: the name 'code' is taken by the served model; --served-name gives it another",
    )


def test_an_unknown_one_is_an_error():
    with pytest.raises(UnknownModelError, match="no/such"):
        _code_model("no/such", DEFAULT_MODEL, "mine")
