"""Operations and memory of training, against what PyTorch counts and keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from shoal.cost.train_flops import forward_flops, train_flops
from shoal.cost.train_memory import activation_bytes, state_bytes
from shoal.model import Model
from shoal.train.losses import LossSettings, TextBatch, language_loss
from shoal.train.optim import OptimiserSettings, make_optimisers

MOE = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    attention=MLAConfig(
        num_attention_heads=2, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24
    ),
    moe=MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    num_nextn_predict_layers=0,
)
DENSE = ModelConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    tie_word_embeddings=True,
)
ROWS, LENGTH = 2, 48


def counted(config: ModelConfig) -> tuple[int, int]:
    """Operations of the forward pass, and of forward and backward, for all tokens, as PyTorch counts them."""
    torch.manual_seed(0)
    model = Model(config)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    with sdpa_kernel(SDPBackend.MATH):  # only products: the fused kernel's backward pass makes scores twice
        with FlopCounterMode(display=False) as counter:
            logits = model(tokens)
            forward = counter.get_total_flops()
            logits.sum().backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("config", [MOE, dataclasses.replace(MOE, tie_word_embeddings=True), DENSE])
def test_as_pytorch_counts(config):
    forward, both = counted(config)
    ours = train_flops(config, LENGTH, causal=False)
    assert sum(ours.forward.values()) * ROWS * LENGTH == forward
    assert ours.model * ROWS * LENGTH == both
    assert ours.recompute == 0


def test_mtp_is_counted():
    """The MTP depth reads one token less than the main model; per token of its own it is exact."""
    config = dataclasses.replace(MOE, num_nextn_predict_layers=1)
    torch.manual_seed(0)
    model = Model(config)
    tokens = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    with sdpa_kernel(SDPBackend.MATH):
        hidden = model.states(tokens).hidden_BTD
        with FlopCounterMode(display=False) as counter:
            model.logits(model.predict_further(hidden, tokens.roll(-1, 1)).hidden_BTD)
    ours = forward_flops(config, LENGTH, causal=False)
    assert (ours["mtp"] + ours["mtp_head"]) * ROWS * LENGTH == counter.get_total_flops()


def test_causal_pairs_and_recomputing():
    whole, causal = (forward_flops(DENSE, 9, causal=causal)["attention_over_sequence"] for causal in (False, True))
    assert causal * 9 == whole * 5  # 1 + 2 + … + 9 = 45 of 81 pairs
    plain, again = (train_flops(DENSE, 64, checkpointing=on) for on in (False, True))
    assert again.model == plain.model
    assert again.recompute == sum(plain.forward.values()) - plain.forward["head"]


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_state_is_what_the_optimiser_holds(optimiser):
    config = dataclasses.replace(MOE, num_nextn_predict_layers=1)
    model = Model(config)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimisers = make_optimisers(model, OptimiserSettings(optimiser=optimiser))
    for one in optimisers:
        one.step()
    held = sum(
        value.numel() * value.element_size()
        for one in optimisers
        for state in one.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    )
    ours = state_bytes(config, optimiser=optimiser)
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("bias"))
    assert ours["weights"] == 4 * (sum(p.numel() for p in model.parameters()) + biases)
    assert abs(ours["optimiser"] - held) <= 8 * biases


def kept(config: ModelConfig, rows: int, length: int) -> int:
    """Bytes that a pass under autocast keeps for the backward pass, without weights and their bf16 copies."""
    torch.manual_seed(0)
    model = Model(config)
    weights = {part.untyped_storage().data_ptr() for part in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed tensor's address would be given out again

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    tokens = torch.randint(0, config.vocab_size, (rows, length))
    batch = TextBatch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))
    with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        language_loss(model, batch, LossSettings())
    head = 4 * config.vocab_size * config.hidden_size  # the loss's gradient of the output head
    return sum(sizes.values()) - state_bytes(config)["bf16_copies"] - head


@pytest.mark.parametrize("config", [MOE, dataclasses.replace(MOE, num_nextn_predict_layers=1), DENSE])
def test_activations_are_about_what_pytorch_keeps(config):
    rows, length = 4, 256
    real, ours = kept(config, rows, length), sum(activation_bytes(config, tokens=rows * length).values())
    assert 0.85 < ours / real < 1.15


def test_checkpointing_keeps_little():
    many = dataclasses.replace(DENSE, num_hidden_layers=24)
    plain, again = (sum(activation_bytes(many, tokens=1, checkpointing=on).values()) for on in (False, True))
    assert again < plain / 4
