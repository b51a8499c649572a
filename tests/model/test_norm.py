"""RMSNorm: the definition, and where rounding happens."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shoal.model import norm as norm_module  # noqa: E402
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


def test_gradients_against_differences(monkeypatch):
    monkeypatch.setattr(norm_module, "CACHED", 12)  # three rows at a time, and a rest
    norm = make_norm(1e-6).double()
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, _: norm(x), (x, norm.weight))
    with torch.no_grad():
        torch.testing.assert_close(norm(x), norm_module._Norm.apply(x, norm.weight, 1e-6, torch.float64))


def test_rows_of_a_wider_tensor_and_a_weight_at_rest():
    norm = make_norm(1e-6).requires_grad_(False)
    wide = torch.randn(6, 3, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = norm(wide[..., 2:6])
    with torch.no_grad():
        torch.testing.assert_close(out, norm(wide[..., 2:6]))
    out.sum().backward()
    assert wide.grad[..., 2:6].any() and not wide.grad[..., :2].any() and norm.weight.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_the_result_has_the_type_of_products(training):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    norm = make_norm(1e-6)
    exact = norm(x)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        out = norm(x)
    assert torch.equal(out, exact.bfloat16())
