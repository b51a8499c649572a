"""Attention in blocks against PyTorch's own, masks and gradients included; float64 makes the comparison exact."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from shoal.model import attend as attend_module  # noqa: E402
from shoal.model import blocked  # noqa: E402
from shoal.model.attend import attend, attention_mask  # noqa: E402
from shoal.model.blocked import attend_in_blocks  # noqa: E402


def some(tokens: int, *, dtype=torch.float64, rows: int = 2):
    """q, k and v as a layer has them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, tokens, 3, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for width in (6, 6, 4)
    ]


def documents(tokens: int, rows: int = 2):
    """Rows packed differently: borders inside a block, on one, and none."""
    borders = [[5, 8, 21], [tokens]][:rows]
    places = torch.arange(tokens)
    return torch.stack([sum((places >= border).long() for border in row) for row in borders])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [2, 8, 29])
def test_equals_scaled_dot_product_attention(tokens, packed, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)
    monkeypatch.setattr(blocked, "SCORES", 8 * tokens * 2)  # two of three heads at a time
    q, k, v = some(tokens)
    mask = attention_mask(tokens, tokens, documents(tokens) if packed else None, q.device)
    upstream = torch.randn(2, 3, tokens, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for out in (
        attend_in_blocks(q, k, v, None if mask is None else mask[:, 0], 0.7),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=0.7),
    ):
        results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.isfinite(results[0][0]).all()


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_against_differences(packed, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 4)
    q, k, v = some(9, rows=2)
    mask = attention_mask(9, 9, documents(9) if packed else None, q.device)
    mask_RTS = None if mask is None else mask[:, 0]
    assert torch.autograd.gradcheck(lambda *qkv: attend_in_blocks(*qkv, mask_RTS, 0.7), (q, k, v))


def test_a_mask_that_shows_the_future_is_followed(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 4)
    q, k, v = some(10, rows=1)
    mask = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(2)) > 0.5
    mask |= torch.eye(10, dtype=torch.bool)
    ours = attend_in_blocks(q, k, v, mask[:, 0], 0.7)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7))


@pytest.mark.parametrize("packed", [False, True])
def test_training_in_bfloat16_takes_the_blocks_and_inference_does_not(packed, monkeypatch):
    taken = []

    def spy(*args):
        taken.append(args)
        return attend_in_blocks(*args)

    monkeypatch.setattr(attend_module, "attend_in_blocks", spy)
    tokens = 130
    q, k, v = (x.transpose(1, 2) for x in some(tokens, dtype=torch.bfloat16))
    mask = attention_mask(tokens, tokens, documents(tokens) if packed else None, q.device)
    out = attend(q, k, v, mask, 0.7)
    if mask is not None:  # one for all rows
        shared = attend(q[:1], k[:1], v[:1], mask[0, 0], 0.7)
        torch.testing.assert_close(shared, out[:1], rtol=0, atol=0)
        taken.pop()
    wide = attend(q.float(), k.float(), v.float(), mask, 0.7)
    with torch.no_grad():
        attend(q, k, v, mask, 0.7)
    assert len(taken) == 1
    gradients = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (out, wide)]
    for ours, theirs in [(out.float(), wide), *zip(*gradients, strict=True)]:
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02


def test_shared_key_heads_take_the_blocks_under_a_mask_alone(monkeypatch):
    taken = []

    def spy(*args):
        taken.append(args)
        return attend_in_blocks(*args)

    monkeypatch.setattr(attend_module, "attend_in_blocks", spy)
    tokens, generator = 130, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, 8, generator=generator).bfloat16().requires_grad_() for heads in (6, 2, 2))
    mask = attention_mask(tokens, tokens, documents(tokens), q.device)
    attend(q, k, v, None, 0.7)
    assert not taken
    out, wide = attend(q, k, v, mask, 0.7), attend(q.float(), k.float(), v.float(), mask, 0.7)
    assert len(taken) == 1
    gradients = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (out, wide)]
    for ours, theirs in [(out.float(), wide), *zip(*gradients, strict=True)]:
        assert ((ours - theirs).norm() / theirs.norm()).item() < 0.02
