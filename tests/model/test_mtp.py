"""Multi-token prediction against transformers' MTP layers, and decoding with it against whole texts."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shoal.model import new_cache  # noqa: E402

# In transformers an MTP layer is built as layer 0, which is dense unless no layer is: hence first_k_dense_replace 0.
CASE = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 2,
    "q_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
}
T = 19


def some_tokens(batch: int = 2, length: int = T):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def rename(name: str) -> list[tuple[str, int | None]]:
    """transformers' name of an MTP tensor to Shoal's; a fused gate_up tensor becomes two, with the half to take."""
    _, depth, rest = name.split(".", 2)
    rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
    prefix = f"model.layers.{CASE['num_hidden_layers'] + int(depth)}."
    if rest == "mlp.experts.gate_up_proj":
        return [(f"{prefix}mlp.experts.gate_proj.weight", 0), (f"{prefix}mlp.experts.up_proj.weight", 1)]
    if rest == "mlp.experts.down_proj":
        rest += ".weight"
    return [(prefix + rest, None)]


@pytest.fixture
def mtp_twins(tmp_path, fill, randomised):
    """transformers' main model and MTP model, and Shoal's model holding both."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    ours = randomised(CASE)
    hf_config = AutoConfig.for_model(**hf_case(), attn_implementation="eager")
    hf_config._experts_implementation = "eager"
    main = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager").eval()
    fill(main, 0)
    mtp = MtpModel(main, 2).eval()
    fill(mtp, 7)
    state = dict(ours.state_dict())
    for name, value in [*main.state_dict().items(), *mtp.state_dict().items()]:
        if name.startswith("layers."):
            targets = rename(name)
        elif name.startswith(("model.", "lm_head.")):
            targets = main_names(name)
        else:
            continue
        for target, half in targets:
            assert target in state, target
            state[target] = value if half is None else value.chunk(2, dim=1)[half]
    ours.load_state_dict(state)
    return main, mtp, ours


def hf_case() -> dict:
    base = dict(CASE)
    base.update(
        vocab_size=97,
        hidden_size=45,
        intermediate_size=70,
        moe_intermediate_size=22,
        num_attention_heads=3,
        num_key_value_heads=3,
        kv_lora_rank=20,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
        n_routed_experts=12,
        n_shared_experts=2,
        num_experts_per_tok=3,
        routed_scaling_factor=1.0,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return base


def main_names(name: str) -> list[tuple[str, int | None]]:
    if name.endswith("mlp.experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}gate_proj.weight", 0), (f"{stem}up_proj.weight", 1)]
    if name.endswith("mlp.experts.down_proj"):
        return [(f"{name}.weight", None)]
    return [(name, None)]


def test_two_depths_match_transformers(mtp_twins):
    main, mtp, ours = mtp_twins
    tokens_BT = some_tokens()
    with torch.no_grad():
        theirs_BTD = main.model(tokens_BT).last_hidden_state
        states = ours.states(tokens_BT)
        assert_same(states.hidden_BTD, theirs_BTD)
        further = ours.predict_further_over_text(states.hidden_BTD, tokens_BT)
        assert len(further) == 2
        for depth, state in enumerate(further, start=1):
            next_BT = tokens_BT[:, depth:]
            theirs_BTD = mtp.forward_layer(
                depth - 1, theirs_BTD[:, :-1], torch.arange(depth, T)[None], None, input_ids=next_BT
            )
            assert_same(state.hidden_BTD, theirs_BTD)
            assert_same(ours.logits(state.hidden_BTD), mtp._project_to_logits(theirs_BTD))
            assert list(state.routings) == [1 + depth]


@pytest.mark.parametrize("absorbed", [False, True])
def test_cached_equals_whole(absorbed, randomised):
    model = randomised(CASE)
    tokens_BT = some_tokens()
    with torch.no_grad():
        hidden_BTD = model.states(tokens_BT).hidden_BTD
        whole = model.predict_further_over_text(hidden_BTD, tokens_BT)[0].hidden_BTD
        cache = new_cache(model.config, batch=2, capacity=T, num_layers=1)
        parts = []
        for start, stop in ((0, 11), (11, 12), (12, 18)):
            further = model.predict_further(
                hidden_BTD[:, start:stop], tokens_BT[:, start + 1 : stop + 1], cache=cache, absorbed=absorbed
            )
            parts.append(further.hidden_BTD)
    assert cache.length == T - 1
    assert_same(torch.cat(parts, dim=1), whole)


def test_packed_documents_do_not_see_each_other(randomised):
    model = randomised(CASE)
    tokens_BT = some_tokens(1)
    documents_BT = torch.tensor([[0] * 8 + [1] * (T - 8)])
    with torch.no_grad():
        hidden_BTD = model.states(tokens_BT, documents_BT=documents_BT).hidden_BTD
        packed = model.predict_further_over_text(hidden_BTD, tokens_BT, documents_BT=documents_BT)
        alone = model.predict_further_over_text(hidden_BTD[:, 8:], tokens_BT[:, 8:])
    for together, single in zip(packed, alone, strict=True):
        assert_same(together.hidden_BTD[:, 8:], single.hidden_BTD)


def test_positions_move_with_the_states(randomised):
    """Rotations are relative, so one shift for all positions changes nothing; stretching them does."""
    model = randomised(CASE)
    tokens_BT = some_tokens()
    with torch.no_grad():
        hidden_BTD = model.states(tokens_BT).hidden_BTD
        plain, shifted, stretched = (
            model.predict_further_over_text(hidden_BTD, tokens_BT, positions=positions)[1].hidden_BTD
            for positions in (None, torch.arange(T) + 30, torch.arange(T) * 5)
        )
    assert_same(shifted, plain)
    assert (stretched - plain).abs().max() > 0.1


def test_mtp_layers_have_experts_and_gradients_reach_everything(randomised):
    model = randomised({**CASE, "first_k_dense_replace": 1})
    tokens_BT = some_tokens()
    states = model.states(tokens_BT)
    further = model.predict_further_over_text(states.hidden_BTD, tokens_BT)
    assert [list(state.routings) for state in further] == [[2], [3]]
    loss = sum(model.logits(state.hidden_BTD).square().mean() for state in (states, *further))
    loss.backward()
    without = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_texts_shorter_than_the_depth_and_unknown_depths(randomised):
    model = randomised(CASE)
    tokens_BT = some_tokens(1, 2)
    states = model.states(tokens_BT)
    assert len(model.predict_further_over_text(states.hidden_BTD, tokens_BT)) == 1
    for depth in (0, 3):
        with pytest.raises(ValueError, match="the model has 2 MTP layers"):
            model.predict_further(states.hidden_BTD, tokens_BT, depth=depth)
