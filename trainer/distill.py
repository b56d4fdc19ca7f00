"""Distillation: while it learns a task, a model goes on answering general text as the bare base does.

Every other row of the task brings a sentence of general text along, and departing from the base's own answer to it is a
loss too (Li and Hoiem 2016, "Learning without Forgetting", ECCV, arXiv:1606.09282, who ask the task's own rows; a whole
distribution as the target: Hinton, Vinyals and Dean 2015, arXiv:1503.02531). The answer is

    of an encoder     the sentence's vector: what is lost is 1 - cosine
    of a generator    how likely each word of the vocabulary is at each token: what is lost is the Kullback-Leibler
                      divergence of the model's probabilities from the base's, the mean over the tokens

The sentences ship with the trainer (`probes/general.txt`). They need no label, and none of them is in a probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import kl_div, log_softmax

from accrual.encoder import Encoder
from accrual.generator import Generator
from accrual.layers import Entering
from trainer.adapter import frozen_states
from trainer.learner import Learner
from trainer.precision import Precision, computing_in

EVERY = 2  # rows bring one sentence: measured on shorter questions: 39 s of CPU in place of 22
_SENTENCES = Path(__file__).parent / "probes" / "general.txt"


class _Read(Protocol):
    """Sentences as a model reads them: `lengths` in tokens; each has as many answers as `sizes` says."""

    lengths: list[int]
    sizes: list[int]

    def answers(self, rows: Sequence[int]) -> torch.Tensor:
        """The model's answers to some sentences, one behind the other, [answers, dimensions]."""
        ...

    def apart(self, now: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """How far each answer is from the base's, [answers]; 0 if it is the same."""
        ...


class General:
    """Sentences of general text, and what the base makes of them: the states that enter the first adapted layer, and
    its answers.
    """

    def __init__(self, model: Encoder | Generator, first: int, rows: int, in_step: bool) -> None:
        """As many sentences as `rows` rows bring, of those there are. `model` still answers as the bare base does."""
        sentences = _SENTENCES.read_text(encoding="utf-8").splitlines()[: 1 + rows // EVERY]
        self.read: _Read = _Embedded(model, sentences) if isinstance(model, Encoder) else _Continued(model, sentences)
        self.base: dict[int, torch.Tensor] = {}

        def forward(some: list[int]) -> None:
            sizes = [self.read.sizes[row] for row in some]
            self.base.update(zip(some, torch.split(self.read.answers(some), sizes), strict=True))

        self.states = frozen_states(model.model, self.read.lengths, range(len(sentences)), first, forward, in_step)


class Distilled:
    """A learner whose rows bring sentences of general text along; its loss is that of both."""

    def __init__(self, learner: Learner, general: General, begin: Entering, weight: float) -> None:
        """`weight`: how much the loss of a sentence counts beside that of a row."""
        self._learner = learner
        self._general = general
        self._begin = begin
        self._weight = weight
        self.parameters = learner.parameters
        self.lengths = learner.lengths
        self.watched = learner.watched
        self.guessing = learner.guessing
        self.device = learner.device

    def loss(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """That of the rows and of the sentences they bring; rows that are only watched bring none.

        Rows that learn and bring none ask one all the same, for nothing: ranks that go in step make as many passes.
        """
        loss, sentences = self._learner.loss(rows, precision), len(self._general.base)
        if rows[0] >= len(self.lengths) - self.watched:
            return loss
        brought = [row // EVERY % sentences for row in rows if row % EVERY == 0]
        return loss + (self._weight if brought else 0.0) * self._departure(brought or [0], precision)

    def _departure(self, sentences: Sequence[int], precision: Precision) -> torch.Tensor:
        """How far the answers to the sentences are from the base's: of each the mean, summed."""
        read = self._general.read
        self._begin.states = self._general.states.of(sentences).to(self.device)
        with computing_in(precision, self.device):
            now = read.answers(sentences)
        by_answer = read.apart(now, torch.cat([self._general.base[row] for row in sentences]))
        parts = torch.split(by_answer, [read.sizes[row] for row in sentences])
        return torch.stack([part.mean() for part in parts]).sum()


class _Embedded:
    """By an encoder: one vector a sentence."""

    def __init__(self, encoder: Encoder, sentences: Sequence[str]) -> None:
        self._encoder = encoder
        self._tokens = encoder.tokenize(sentences)
        self.lengths = [len(tokens) for tokens in self._tokens]
        self.sizes = [1] * len(sentences)

    def answers(self, rows: Sequence[int]) -> torch.Tensor:
        return self._encoder.pooled([self._tokens[row] for row in rows]).float()

    def apart(self, now: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return 1 - (now * base).sum(1)


class _Continued:
    """By a generator: the state that each token follows from."""

    def __init__(self, generator: Generator, sentences: Sequence[str]) -> None:
        self._generator = generator
        self._written = generator.written([""] * len(sentences), sentences)
        self.lengths = [len(one.tokens) for one in self._written]
        self.sizes = [len(one.tokens) - one.start for one in self._written]

    def answers(self, rows: Sequence[int]) -> torch.Tensor:
        return self._generator.states_before([self._written[row] for row in rows])[0].float()

    def apart(self, now: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        said, wanted = (log_softmax(self._generator.logits(states).float(), dim=1) for states in (now, base))
        return kl_div(said, wanted, reduction="none", log_target=True).sum(1)
