"""Tiny random models in memory, opened by the engine, and the means to look inside it.

The weights come from transformers models of odd sizes (the cases of tests/model), so what the engine computes is
compared with transformers itself. Nothing here needs a file.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.model.conftest import Case, full_case, make_hf, our_config, stack_experts  # noqa: E402

from shoal import LLM  # noqa: E402
from shoal.config import ModelConfig  # noqa: E402
from shoal.formats.checkpoint import Checkpoint, LazyTensor  # noqa: E402
from shoal.formats.layout import expected_tensors  # noqa: E402
from shoal.formats.tokenizer import StreamDecoder  # noqa: E402

VOCABULARY = 97
V2 = {"model_type": "deepseek_v2", "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
V3 = {"model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "q_lora_rank": 24, "n_shared_experts": 1}
LLAMA = {"model_type": "llama"}


class TinyTokenizer:
    """97 tokens: printable characters, then the bytes of "€" and "ö" one by one, so that streams split code points."""

    vocab_size = VOCABULARY
    bos_token_id = None
    eos_token_ids: tuple[int, ...] = ()
    strips_first_space = False

    def __init__(self) -> None:
        pieces = [bytes([33 + i]) for i in range(80)] + [bytes([byte]) for byte in "€ö".encode()]
        self._bytes = [*pieces, *(b"<%d>" % i for i in range(len(pieces), VOCABULARY))]

    def encode(self, text: str) -> list[int]:
        return [self._bytes.index(char.encode()) for char in text]

    def decode(self, ids: list[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        return self._bytes[token] if token < VOCABULARY else b""

    def is_special(self, token: int) -> bool:
        return False

    def stream(self, *, continuing: bool = False) -> StreamDecoder:
        return StreamDecoder(self, skip_special=True, continuing=continuing)  # type: ignore[arg-type]


def in_memory(config: ModelConfig, tensors: Mapping[str, NDArray[Any]], tokenizer: Any = None) -> Checkpoint:
    """A checkpoint of float32 arrays under Shoal's names."""

    def lazy(name: str, array: NDArray[Any]) -> LazyTensor:
        return LazyTensor(
            name=name,
            shape=array.shape,
            dtype="F32",
            source=Path("tiny"),
            make_chunks=lambda: iter(np.split(array, len(array)) if array.ndim == 3 else [array]),
        )

    return Checkpoint(
        path=Path("tiny"),
        config=config,
        tensors={name: lazy(name, array) for name, array in tensors.items()},
        load_tokenizer=lambda: tokenizer or TinyTokenizer(),
        load_chat=lambda: None,
    )


def tiny(case: Case, seed: int = 0) -> tuple[Any, Checkpoint]:
    """A transformers model and a checkpoint that holds its weights."""
    case = {**case, "max_position_embeddings": 1024}
    hf = make_hf(case, seed)
    published = {name: value.detach() for name, value in hf.state_dict().items()}
    tensors = stack_experts(_unfuse(published, full_case(case)))
    if case.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return hf, in_memory(our_config(case), {name: value.numpy() for name, value in tensors.items()})


def with_prediction_layer(checkpoint: Checkpoint, seed: int = 5) -> Checkpoint:
    """The same model with a random multi-token-prediction layer, whose guesses are as good as chance."""
    config = replace(checkpoint.config, num_nextn_predict_layers=1)
    rng = np.random.default_rng(seed)
    tensors = {name: tensor.read() for name, tensor in checkpoint.tensors.items()}
    for name, shape in expected_tensors(config).items():
        if name not in tensors:
            tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(1.5 / shape[-1] ** 0.5)
    return in_memory(config, tensors)


def _unfuse(state: dict[str, Any], case: Case) -> dict[str, Any]:
    """transformers 5 keeps experts stacked, gate and up fused; on disk, and for Shoal, they are apart."""
    out: dict[str, Any] = {}
    for name, value in state.items():
        if name.endswith(".experts.gate_up_proj"):
            width = case["moe_intermediate_size"]
            stem = name.removesuffix("gate_up_proj")
            out[f"{stem}gate_proj.weight"] = value[:, :width].contiguous()
            out[f"{stem}up_proj.weight"] = value[:, width:].contiguous()
        elif name.endswith(".experts.down_proj"):
            out[f"{name}.weight"] = value
        else:
            out[name] = value
    return out


def open_tiny(checkpoint: Checkpoint, **options: Any) -> LLM:
    """An engine in float32 on one thread with a small cache."""
    return LLM(checkpoint, **{"weights": "f32", "cache": "f32", "threads": 1, "cache_tokens": 1024, **options})


def some_tokens(count: int, seed: int = 1, vocabulary: int = VOCABULARY) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=count)


def set_steps(llm: LLM, *, step: int, mixed: int | None = None) -> None:
    """How many prompt tokens a step takes."""
    llm._core._scheduler._step_tokens = step
    llm._core._scheduler._mixed_tokens = mixed or step


def check_books(llm: LLM) -> None:
    """The page books agree with the sequences; call it only while nothing steps."""
    core = llm._core
    held = [sequence.pages for sequence in (*core._scheduler.running, *core._scheduler.waiting)]
    core._pool.check(held)


def assert_idle(llm: LLM) -> None:
    """Nothing runs or waits, and every page is free."""
    check_books(llm)
    assert (llm.load.running, llm.load.waiting, llm.load.pages_in_use) == (0, 0, 0)


class Gate:
    """Stands before the native engine: counts steps, may hold them from a certain one on, or make them fail."""

    def __init__(self, llm: LLM) -> None:
        self._engine = llm._core._engine
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.steps = 0
        self.hold_from = 1
        self.fails: Exception | None = None
        self.fails_at: Callable[[tuple[Any, ...]], bool] = lambda arrays: True
        llm._core._engine = self  # type: ignore[assignment]

    def run(self, *arrays: Any, **rest: Any) -> None:
        self.steps += 1
        self.entered.release()
        assert self.steps < self.hold_from or self.open.wait(10)
        if self.fails is not None and self.fails_at(arrays):
            raise self.fails
        self._engine.run(*arrays, **rest)


@pytest.fixture(scope="module")
def v2() -> tuple[Any, Checkpoint]:
    return tiny(V2)


@pytest.fixture(scope="module")
def v3() -> tuple[Any, Checkpoint]:
    return tiny(V3)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Checkpoint]:
    return tiny(LLAMA)


@pytest.fixture
def opened() -> Iterator[Callable[..., LLM]]:
    """Opens engines, and checks at the end that each is idle with all pages free."""
    engines: list[LLM] = []

    def make(checkpoint: Checkpoint, **options: Any) -> LLM:
        engines.append(open_tiny(checkpoint, **options))
        return engines[-1]

    yield make
    for engine in engines:
        assert_idle(engine)
