"""lm-eval's view of a model, answered by Shoal's engine: requests run together in its scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from shoal.engine import LLM, SamplingParams
from shoal.engine.generation import Generation, run_together
from shoal.engine.outputs import Chunk
from shoal.errors import RequestError

Progress = Callable[[int, int], None]
AT_ONCE = 128  # requests handed to the engine together
MAX_NEW_TOKENS = 256
# What lm-eval's tasks may say about generation, beside what is handled by name.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods and generations of an opened model.

    Texts longer than the context lose their beginning, as in lm-eval's own backends.
    """

    def __init__(self, llm: LLM, progress: Progress | None = None) -> None:
        super().__init__()
        self.llm = llm
        self.progress = progress

    @property
    def eot_token_id(self) -> int:
        ids = self.llm.tokenizer.eos_token_ids or self.llm.config.eos_token_id
        if not ids:
            raise RequestError("model", "has no end-of-text token, which an empty context is scored after")
        return int(min(ids))

    @property
    def prefix_token_id(self) -> int:
        bos = self.llm.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.llm.tokenizer
        bos = tokenizer.bos_token_id
        if add_special_tokens is None and bos is not None and string.startswith(str(tokenizer.token_string(bos))):
            add_special_tokens = False  # a chat format has written it already
        return tokenizer.encode(string, add_bos=add_special_tokens, parse_special=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ids = self.llm.encode_chat(chat_history)
        return self.llm.tokenizer.decode(ids, skip_special=False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        def prepare(index: int) -> Generation:
            tokens = (requests[index][1] + requests[index][2])[-self.llm.max_context :]
            return self.llm.prepare(tokens, SamplingParams(logprobs=1), score=True, generate=False)

        def finish(index: int, chunks: list[Chunk]) -> tuple[float, bool]:
            scores = [entry for chunk in chunks for entry in chunk.logprobs][1:]
            scores = scores[-len(requests[index][2]) :]
            greedy = all(entry.top[0][0] == entry.token_id for entry in scores)
            return sum(entry.logprob for entry in scores), greedy

        return self._run(len(requests), prepare, finish)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.llm.max_context - 1, 1)
            found = [(None, *make_disjoint_window(pair)) for pair in cut]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def prepare(index: int) -> Generation:
            context, wishes = requests[index].args
            params = sampling(wishes)
            room = self.llm.max_context - (params.max_tokens or 1)
            if room < 1:
                raise RequestError("max_gen_toks", f"{params.max_tokens} leave no room in {self.llm.max_context}")
            return self.llm.prepare(self.tok_encode(context)[-room:] or [self.prefix_token_id], params)

        def finish(index: int, chunks: list[Chunk]) -> str:
            return "".join(chunk.text for chunk in chunks)

        return self._run(len(requests), prepare, finish)

    def _run(
        self, count: int, prepare: Callable[[int], Generation], finish: Callable[[int, list[Chunk]], Any]
    ) -> list[Any]:
        """Results of all requests in order; a group at a time is in the engine."""
        out: list[Any] = []
        for start in range(0, count, AT_ONCE):
            running = [prepare(index) for index in range(start, min(start + AT_ONCE, count))]
            for index, chunks in enumerate(run_together(self.llm.step, running), start):
                out.append(finish(index, chunks))
            if self.progress is not None:
                self.progress(len(out), count)
        return out


def sampling(wishes: dict[str, Any]) -> SamplingParams:
    """lm-eval's generation arguments; greedy unless `do_sample`. RequestError for one that is not understood."""
    left = dict(wishes)
    until = left.pop("until", None) or ()
    tokens = next((left.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in left), MAX_NEW_TOKENS)
    sample = bool(left.pop("do_sample", False))
    chosen = {name: left.pop(name) for name in _SAMPLING if name in left}
    if left:
        raise RequestError(next(iter(left)), "is a generation argument that is not understood")
    if not sample:
        chosen = {"temperature": 0.0, **{k: v for k, v in chosen.items() if k == "repetition_penalty"}}
    stop = (until,) if isinstance(until, str) else tuple(until)
    return SamplingParams(max_tokens=int(tokens), stop=stop, **chosen)
