"""Bases in 8 and 4 bits: the same numbers as a model that was rounded beforehand, the same gradients, less memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shoal.errors import ConfigError  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.tune.adapters import attach, targets  # noqa: E402
from shoal.tune.frozen import GROUP, KEPT, FrozenMatrix, load_base, quantise, widen  # noqa: E402

TOKENS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("bits", "error"), [(8, 1 / 254), (4, 1 / 14)])
def test_rounding_stays_within_half_a_step(bits, error):
    rows = torch.randn(6, 75, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(rows, bits)
    back = widen(codes, scales, bits, torch.float32)[:, :75]
    most = torch.nn.functional.pad(rows, (0, 21)).view(6, 3, GROUP).abs().amax(-1).repeat_interleave(GROUP, 1)[:, :75]
    assert ((back - rows).abs() <= 1.02 * error * most).all()
    assert codes.numel() * 8 == 6 * 96 * bits
    assert torch.equal(widen(*quantise(torch.zeros(2, 40), bits), bits, torch.float32), torch.zeros(2, 64))


@pytest.mark.parametrize("bits", [8, 4])
def test_small_weights_round_as_well_as_large_ones(bits):
    """Down to scales that float16 holds as subnormal numbers only."""
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    whole = widen(*quantise(rows, bits), bits, torch.float32)
    for size in (1e-2, 1e-3, 3e-4):
        small = widen(*quantise(rows * size, bits), bits, torch.float32) / size
        assert (small - rows).abs().max() < 1.1 * (whole - rows).abs().max(), size


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["v3", "qwen2"])
def test_a_frozen_base_computes_and_differentiates_as_its_rounded_twin(hf_folder, weights, family):
    _, folder = hf_folder(family)
    checkpoint = open_checkpoint(folder)
    base = load_base(checkpoint, weights=weights, dtype=torch.float32)
    twin = load_model(checkpoint)
    frozen = {name: module for name, module in base.named_modules() if isinstance(module, FrozenMatrix)}
    assert len(frozen) >= 14
    assert not any(name.endswith(KEPT) for name in frozen)
    with torch.no_grad():
        for name, module in frozen.items():
            stack = twin.get_parameter(f"{name}.weight")
            if stack.dim() == 3:
                stack.copy_(torch.stack([module.widen(e) for e in range(len(stack))]))
            else:
                stack.copy_(module.widen())
    outs, grads = [], []
    for model in (base, twin):
        known = targets(model)
        factors = attach(model, {target: (2,) * shape[0] for target, shape in known.items()})
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for one in factors.values():
                one.a.copy_(torch.randn(one.a.shape, generator=generator) * 0.1)
                one.b.copy_(torch.randn(one.b.shape, generator=generator) * 0.1)
        logits = model(TOKENS)
        logits.logsumexp(-1).sum().backward()
        outs.append(logits.detach())
        grads.append([one.a.grad for one in factors.values()])
    assert (outs[0] - outs[1]).abs().max() < 1e-4
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7


def test_memory_of_a_frozen_base(hf_folder):
    _, folder = hf_folder("v3")
    checkpoint = open_checkpoint(folder)

    def held(model):
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    sizes = {w: held(load_base(checkpoint, weights=w, dtype=torch.bfloat16)) for w in ("keep", "int8", "int4")}
    assert sizes["keep"] > 1.2 * sizes["int8"] > 1.3 * sizes["int4"]
    assert not any(p.requires_grad for p in load_base(checkpoint, weights="int4", dtype=torch.bfloat16).parameters())
    with pytest.raises(ConfigError, match="base: 'int3' is not one of keep, int8, int4"):
        load_base(checkpoint, weights="int3", dtype=torch.float32)
