"""Which experts each token went to: against transformers' own routers, and the same however the work was cut up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.engine.conftest import V2, V3, assert_idle, open_tiny, set_steps, some_tokens, tiny, with_prediction_layer  # noqa: E402

from shoal import LLM  # noqa: E402
from shoal.engine import SamplingParams  # noqa: E402
from shoal.engine.expert_load import ExpertLoad  # noqa: E402
from shoal.engine.routing import Routing, routed_layers  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, routing=True)


def theirs(hf: Any, tokens: Sequence[int]) -> list[tuple[Any, Any, Any]]:
    """(router logits, weights, indices) of each layer with experts, from transformers."""
    seen: list[tuple[Any, Any, Any]] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, out: seen.append(out))
        for layer in hf.model.layers
        if hasattr(layer.mlp, "gate")
    ]
    with torch.no_grad():
        hf(torch.tensor([list(tokens)]))
    for hook in hooks:
        hook.remove()
    return seen


class Heard:
    """What was reported of one sequence, by position."""

    def __init__(self) -> None:
        self.parts: list[Routing] = []

    def __call__(self, routing: Routing) -> None:
        self.parts.append(routing)

    def rows(self) -> dict[int, tuple[int, bytes, bytes, bytes]]:
        out: dict[int, tuple[int, bytes, bytes, bytes]] = {}
        for part in self.parts:
            for index, token in enumerate(part.tokens):
                assert part.first + index not in out, "reported twice"
                columns = (part.experts_LTK, part.weights_LTK, part.entropy_LT)
                out[part.first + index] = (token, *(column[:, index].tobytes() for column in columns))  # type: ignore[assignment]
        return out


def run(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> tuple[list[int], Heard]:
    heard, tokens = Heard(), list(prompt)
    for chunk in llm.stream(prompt, params):
        tokens.extend(chunk.token_ids)
        heard.parts.extend(chunk.routing)
    return tokens, heard


@pytest.mark.parametrize("case", [V2, V3], ids=["v2", "v3"])
def test_experts_weights_and_entropy_are_those_of_transformers(case: dict[str, Any]) -> None:
    hf, checkpoint = tiny(case)
    llm = open_tiny(checkpoint)
    set_steps(llm, step=37)
    tokens, heard = run(
        llm, some_tokens(90), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, routing=True)
    )
    experts, weights, entropy = (
        np.concatenate([getattr(part, name) for part in heard.parts], axis=1)
        for name in ("experts_LTK", "weights_LTK", "entropy_LT")
    )
    assert [part.first for part in heard.parts[:3]] == [0, 37, 74]
    assert sum((part.tokens for part in heard.parts), ()) == tuple(tokens[:-1])  # nothing reads an answer's last token
    expected = theirs(hf, tokens[:-1])
    assert len(expected) == len(routed_layers(llm.config)) == len(experts)
    for layer, (logits_TE, weights_TK, indices_TK) in enumerate(expected):
        order_TK = indices_TK.argsort(-1)
        ours_TK = experts[layer].argsort(-1)
        np.testing.assert_array_equal(np.sort(experts[layer]), indices_TK.sort(-1).values.numpy())
        np.testing.assert_allclose(
            np.take_along_axis(weights[layer], ours_TK, -1), weights_TK.gather(-1, order_TK).numpy(), rtol=1e-4
        )
        p_TE = logits_TE.sigmoid() if case is V3 else logits_TE.softmax(-1)
        np.testing.assert_allclose(entropy[layer], torch.distributions.Categorical(p_TE).entropy().numpy(), rtol=1e-4)
        assert len(np.unique(experts[layer])) > 4, "everything went one way: nothing was told apart"


def test_the_same_however_the_work_was_cut_up() -> None:
    """Chunked prompts, neighbours in the step, wrong and right guesses, the model's own guesses, lost pages."""
    _, plain = tiny(V3)
    checkpoint = with_prediction_layer(plain)
    prompt = some_tokens(70)
    tokens, heard = run(open_tiny(checkpoint), prompt)
    expected = heard.rows()
    assert list(expected) == list(range(len(tokens) - 1))
    for options, step in (
        ({"speculate": 4}, 512),
        ({"look_ahead": True, "threads": 2}, 11),
        ({"weights": "f32", "speculate": 8}, 5),
    ):
        llm = open_tiny(checkpoint, **options)
        set_steps(llm, step=step)
        again, heard = run(llm, prompt)
        assert again == tokens
        assert heard.rows() == expected, options
    llm = open_tiny(checkpoint, cache_tokens=4 * 64)
    generations = [llm.prepare(some_tokens(60, seed=7), GREEDY), llm.prepare(prompt, GREEDY)]
    last = generations[-1]._sequence
    last.on_routing.append(heard := Heard())
    for generation in generations:
        generation.start()
    while not all(generation._sequence.finish for generation in generations):
        assert llm.step()
    assert last.preempted > 0
    assert heard.rows() == expected
    for generation in generations:
        generation.cancel()
    assert_idle(llm)


def test_what_came_from_the_cache_is_not_reported_again() -> None:
    _, checkpoint = tiny(V3)
    llm = open_tiny(checkpoint)
    prompt = some_tokens(150)
    _, first = run(llm, prompt)
    _, second = run(llm, prompt)
    assert list(second.rows()) == list(first.rows())[128:]
    assert all(first.rows()[position] == row for position, row in second.rows().items())


def test_nothing_is_reported_unasked_nor_by_models_without_experts() -> None:
    _, checkpoint = tiny(V3)
    llm = open_tiny(checkpoint)
    assert run(llm, some_tokens(9), SamplingParams(max_tokens=3))[1].parts == []
    assert run(open_tiny(tiny({"model_type": "llama"})[1]), some_tokens(9))[1].parts == []


def test_a_listener_that_fails_ends_its_own_request_only() -> None:
    _, checkpoint = tiny(V3)
    llm = open_tiny(checkpoint)

    def refuse(routing: Routing) -> None:
        raise OSError("no space")

    bad, good = llm.prepare(some_tokens(5), GREEDY), llm.prepare(some_tokens(6), GREEDY)
    bad._sequence.on_routing.append(refuse)
    bad.start()
    good.start()
    while good._sequence.finish is None:
        llm.step()
    bad.ready()  # the token that it had
    with pytest.raises(OSError, match="no space"):
        bad.ready()
    assert good._sequence.finish == "length"
    good.cancel()
    assert_idle(llm)


def test_asking_for_another_step_s_routing_is_refused() -> None:
    _, checkpoint = tiny(V3)
    engine = open_tiny(checkpoint)._core._engine
    layers = len(routed_layers(checkpoint.config))
    assert checkpoint.config.moe is not None
    active = checkpoint.config.moe.num_experts_per_tok
    for shape in ((layers, 3, active), (layers + 1, 3, active), (layers, 0, active)):
        arrays = np.empty(shape, np.int32), np.empty(shape, np.float32), np.empty((*shape[:2], 16), np.float32)
        with pytest.raises(ValueError, match="routing of another step"):
            engine.routing(*arrays)


def test_a_step_in_sixteen_counts_towards_the_experts_load() -> None:
    llm = open_tiny(tiny(V3)[1])
    load = llm.expert_load = ExpertLoad(llm.config)
    assert load.imbalance() == {}
    llm.generate(some_tokens(20), SamplingParams(temperature=0, max_tokens=17, ignore_eos=True))
    picked = llm.config.moe.num_experts_per_tok  # type: ignore[union-attr]
    # The first step reads the prompt, the seventeenth one token.
    assert load.counts_LE.sum(axis=1).tolist() == [(20 + 1) * picked] * len(load.layers)
    assert all(ratio >= 1 for ratio in load.imbalance().values())
