"""Distillation: a student learns from a teacher's answers, from its likeliest tokens, or from its view of the student.

    sequences   the teacher writes answers, a verifier throws out wrong ones, the student is tuned on the rest
    logits      the student matches the teacher's distribution at each token of given answers, K likeliest kept on disk
    on-policy   the student writes, the teacher says at each token what it would have written (reverse KL)

The last two need the same tokenizer and refuse another. All run in the tuning loop and are as safe as it.

Shapes: B rows, T tokens, X learnt tokens, D model, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoal import hub
from shoal.engine import LLM
from shoal.errors import ConfigError
from shoal.formats.chat_answers import Tokens
from shoal.formats.checkpoint import open_checkpoint
from shoal.train.batches import IGNORE, Batch
from shoal.train.evaluate import write
from shoal.train.log import Record
from shoal.train.loop import Observer, Outcome, claim
from shoal.train.losses import Losses, TextBatch, linear_cross_entropy, real_tokens, without_padding
from shoal.train.process import Process
from shoal.train.recipe import number, one_of, whole
from shoal.tune.distil_losses import kept_divergence, reverse_divergence
from shoal.tune.recipe import TuneRecipe
from shoal.tune.sft import Data, TuneRun
from shoal.tune.teacher import TeacherLogits, open_logits, require_same_tokens, write_logits
from shoal.tune.tokens import pack, spans

MODES = ("sequences", "logits", "on-policy")
LOGITS = "logits"


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """Attributes:
    teacher: short name, folder or GGUF file.
    mode: `sequences`, `logits` or `on-policy`.
    top: tokens kept of the teacher's distribution.
    given: weight of the loss on the given answers beside the divergence (`logits`).
    samples: answers that the teacher draws for an example (`sequences`); the first accepted one is kept.
    temperature: of those answers, and of the student's own (`on-policy`).
    max_tokens: most tokens of an answer.
    """

    teacher: str = ""
    mode: str = "logits"
    top: int = 32
    given: float = 0.2
    samples: int = 1
    temperature: float = 0.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        one_of("distil.mode", self.mode, MODES)
        whole("distil.top", self.top, 1, 1 << 16)
        number("distil.given", self.given, 0.0, 1.0)
        whole("distil.samples", self.samples, 1, 1 << 10)
        number("distil.temperature", self.temperature, 0.0, 100.0)
        whole("distil.max_tokens", self.max_tokens, 1, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class DistilRecipe(TuneRecipe):
    """A complete distillation: a tuning run of the student with a teacher beside it. On logits and on-policy, its
    divergence is the whole loss: `losses.*` has no meaning there."""

    distil: DistilSettings = field(default_factory=DistilSettings)


def with_teacher(recipe: TuneRecipe, settings: DistilSettings) -> DistilRecipe:
    """A tuning recipe with a teacher beside it."""
    return DistilRecipe(**{one.name: getattr(recipe, one.name) for one in fields(recipe)}, distil=settings)


def distil(recipe: DistilRecipe, out: Path, data: Data, teacher: LLM, observer: Observer) -> Outcome:
    """Start or go on with a distillation on logits or on the student's own samples.

    Raises:
        ConfigError: the tokenizers differ; otherwise as `sft.tune`.
    """
    require_same_tokens(teacher.tokenizer, data.tokenizer)
    kind = {"logits": LogitsRun, "on-policy": OnPolicyRun}[recipe.distil.mode]
    Process().begin(recipe)
    with claim(recipe, out):
        run = kind(recipe, out, data, teacher, observer)
        try:
            return run.go(recipe.steps)
        finally:
            run.close()


def shared_tokens(teacher: LLM, recipe: DistilRecipe) -> int:
    """How many tokens both models score. Models of one tokenizer fill their embeddings up to different sizes; the rows
    past the smaller one belong to no token and are left out of every comparison."""
    return min(teacher.config.vocab_size, recipe.model.vocab_size)


class DistilRun(TuneRun):
    """What both have in common: a teacher, and the head that turns states into logits."""

    def __init__(self, recipe: DistilRecipe, out: Path, data: Data, teacher: LLM, observer: Observer) -> None:
        self.settings, self.teacher = recipe.distil, teacher
        self.shared = shared_tokens(teacher, recipe)
        super().__init__(recipe, out, data, observer)

    def _head(self) -> Tensor:
        model = self.model
        return model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight

    def _shared_head(self) -> Tensor:
        head_VD = self._head()
        return head_VD if len(head_VD) == self.shared else head_VD[: self.shared]

    def _given(self, hidden_XD: Tensor, targets_BT: Tensor) -> Tensor:
        """Σ cross-entropy of the tokens that are there."""
        targets_X = targets_BT[targets_BT != IGNORE]
        ones_X = torch.ones(len(targets_X), device=hidden_XD.device)
        return linear_cross_entropy(hidden_XD, self._head(), targets_X, ones_X)[0]

    def _states(self, micro: TextBatch) -> tuple[Tensor, Losses]:
        """States at the learnt targets, [X, D], and an empty account to be filled."""
        states = self.model.states(micro.tokens_BT, documents_BT=micro.documents_BT)
        learnt_BT = micro.targets_BT != IGNORE
        routings = without_padding(states.routings, real_tokens(micro.documents_BT))
        return states.hidden_BTD[learnt_BT], Losses(states.hidden_BTD.new_zeros(()), {}, routings)


class LogitsRun(DistilRun):
    """Learns the teacher's distribution at given answers."""

    logits: TeacherLogits

    def __init__(self, recipe: DistilRecipe, out: Path, data: Data, teacher: LLM, observer: Observer) -> None:
        key = hashlib.sha256(f"{data.digest} {recipe.distil.teacher} {recipe.sequence_length}".encode()).hexdigest()
        folder, shared = out / LOGITS, shared_tokens(teacher, recipe)
        top = min(recipe.distil.top, shared)
        if not folder.exists():
            observer.note(f"the teacher reads {len(data.rows)} rows")
            write_logits(teacher, data.rows, folder, top=top, among=shared, key=key)
        self.logits = open_logits(folder, data.rows, top=top, key=key)
        self.waiting: Iterator[int] = iter(())
        super().__init__(recipe, out, data, teacher, observer)

    def run_step(self) -> Record:
        first = self.step * self.recipe.batch
        self.waiting = iter([self.batches.window_at(first + i) for i in range(self.recipe.batch)])
        return super().run_step()

    def losses(self, micro: TextBatch, num_targets: Tensor) -> Losses:
        kept = [self.logits.row(next(self.waiting)) for _ in range(len(micro.tokens_BT))]
        ids_XK = torch.from_numpy(np.concatenate([ids for ids, _ in kept]).astype(np.int64)).to(self.process.device)
        logprobs_XK = torch.from_numpy(np.concatenate([values for _, values in kept]).astype(np.float32))
        hidden_XD, account = self._states(micro)
        divergence = (
            kept_divergence(hidden_XD, self._shared_head(), ids_XK, logprobs_XK.to(ids_XK.device)) / num_targets
        )
        given = self._given(hidden_XD, micro.targets_BT) / num_targets
        total = (1 - self.settings.given) * divergence + self.settings.given * given
        parts = {"next": given.detach(), "divergence": divergence.detach()}
        return account._replace(total=total, parts=parts)


class OnPolicyRun(DistilRun):
    """Learns from its own samples, at each token of which the teacher says what it would have written."""

    def __init__(self, recipe: DistilRecipe, out: Path, data: Data, teacher: LLM, observer: Observer) -> None:
        self.ends = {*data.ends, *data.tokenizer.eos_token_ids}
        self.questions = questions_of(data, recipe.sequence_length - recipe.distil.max_tokens)
        super().__init__(recipe, out, data, teacher, observer)
        self.batches = SampledBatches(self)  # type: ignore[assignment]

    def losses(self, micro: TextBatch, num_targets: Tensor) -> Losses:
        hidden_XD, account = self._states(micro)
        divergence = reverse_divergence(hidden_XD, self._shared_head(), self._opinion(micro)) / num_targets
        with torch.no_grad():
            own = self._given(hidden_XD, micro.targets_BT) / num_targets
        return account._replace(total=divergence, parts={"next": own, "divergence": divergence.detach()})

    def _opinion(self, micro: TextBatch) -> Tensor:
        """The teacher's log-probabilities of the shared tokens at the learnt targets, [X, V]."""
        assert micro.documents_BT is not None
        out = []
        batch = Batch(*(part.cpu().numpy() for part in (micro.tokens_BT, micro.targets_BT, micro.documents_BT)))
        for b in range(len(batch.tokens_BT)):
            for begin, end in spans(batch.documents_BT[b]):
                wanted = np.flatnonzero(batch.targets_BT[b, begin:end] != IGNORE)
                if len(wanted):
                    logits = self.teacher.logits(batch.tokens_BT[b, begin:end].tolist())[wanted, : self.shared]
                    out.append(torch.from_numpy(logits).log_softmax(-1))
        return torch.cat(out).to(self.process.device)


def questions_of(data: Data, room: int) -> list[list[int]]:
    """The ids before the first answer of every document that leave room for an answer."""
    out = []
    for b in range(len(data.rows)):
        for begin, end in spans(data.rows.documents[b]):
            answer = int(np.flatnonzero(data.rows.targets[b, begin:end] != IGNORE)[0]) + 1
            if answer <= room:
                out.append(data.rows.tokens[b, begin : begin + answer].tolist())
    if not out:
        raise ConfigError("distil.max_tokens", "leaves no room for a question in sequence_length")
    return out


class SampledBatches:
    """Batches that the student writes, from its present weights and a random stream that the step decides."""

    def __init__(self, run: OnPolicyRun) -> None:
        self.run = run

    def batch_at(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        run = self.run
        generator = torch.Generator().manual_seed((run.recipe.seed * 1_000_003 + step) % (1 << 63))
        sequences: list[Tokens] = []
        while len(sequences) < run.recipe.batch:
            question = run.questions[int(torch.randint(len(run.questions), (), generator=generator))]
            answer = list(self._answer(question, generator))
            sequences.append(Tokens([*question, *answer], [False] * len(question) + [True] * len(answer)))
        rows = pack(sequences, run.recipe.sequence_length, pad=0)
        return rows.read(list(range(len(rows))))

    def _answer(self, question: list[int], generator: torch.Generator) -> Iterator[int]:
        """What the student writes, its end token included if it came to one."""
        run, settings = self.run, self.run.settings
        for token in write(
            run.model, question, settings.max_tokens, temperature=settings.temperature, generator=generator,
            process=run.process, among=run.shared,
        ):  # fmt: skip
            yield token
            if token in run.ends:
                return


def open_teacher(name: str, *, max_context: int, threads: int | None = None) -> LLM:
    """The teacher in the engine."""
    return LLM(open_checkpoint(hub.resolve(name)), max_context=max_context, threads=threads)
