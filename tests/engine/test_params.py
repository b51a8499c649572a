"""Bounds of the sampling settings."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shoal.engine import SamplingParams
from shoal.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 2**40, 1.5, True, "7")],
        *[("temperature", value) for value in (-0.1, 101, math.nan, math.inf, "hot", True)],
        *[("top_k", value) for value in (-1, 2**40, 1.0)],
        *[("top_p", value) for value in (0, -1, 1.01, math.nan)],
        *[("min_p", value) for value in (-0.1, 1.1)],
        *[("seed", value) for value in (2**64, -(2**63) - 1, 1.5, "1")],
        *[("logprobs", value) for value in (-1, 21, 1.5, True)],
        *[("presence_penalty", value) for value in (2.1, -2.1, math.nan)],
        *[("frequency_penalty", value) for value in (2.1, math.inf)],
        *[("repetition_penalty", value) for value in (0, 11, math.nan)],
        *[("stop", value) for value in (("",), ("a",) * 17, ("x" * 1025,))],
        *[("logit_bias", value) for value in ({-1: 0.0}, {1: 101.0}, {1: math.nan}, {1: -math.inf}, {1.5: 1.0})],
    ],
)
def test_a_setting_out_of_bounds_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name


def test_the_bounds_themselves_are_allowed() -> None:
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1.0, min_p=1.0, seed=2**64 - 1, logprobs=20)
    SamplingParams(temperature=100, presence_penalty=-2, frequency_penalty=2, repetition_penalty=0.01, seed=-(2**63))
    SamplingParams(stop=("x" * 1024,) * 16, logit_bias={0: -100, 2**31: 100})
