"""RMSNorm: the definition, and where rounding happens."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shoal.model.norm import RMSNorm  # noqa: E402


def make_norm(eps: float) -> RMSNorm:
    norm = RMSNorm(4, eps)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0, 0.5]))
    return norm


def test_definition():
    x = torch.tensor([[3.0, -1.0, 1.0, 1.0]])  # mean square 3
    expected = torch.tensor([[3.0, -2.0, -1.0, 0.5]]) / 2  # sqrt(3 + 1)
    torch.testing.assert_close(make_norm(1.0)(x), expected)


def test_bfloat16_is_rounded_once_at_the_end():
    norm = make_norm(1e-6).bfloat16()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = make_norm(1e-6)(x.float())
    assert torch.equal(norm(x), exact.bfloat16())
    assert norm(x).dtype == torch.bfloat16
