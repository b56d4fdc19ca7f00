"""Learners: what the loop trains. A learner knows its rows, and the loss of any of them as the weights are now."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from accrual.encoder import Encoder
from accrual.errors import TrainingFailed
from accrual.generator import Generator, Written
from accrual.layers import Entering
from accrual.reward import SIGNS
from accrual.training_policy import Training
from trainer.adapter import States
from trainer.precision import Precision, computing_in
from trainer.probe import weighted_loss


class Learner(Protocol):
    """`parameters` are those that learn. `lengths`: the tokens that each row costs, oldest row first. The last
    `watched` rows are not learned from: early stopping looks at them. `guessing`: the loss a row of a model that knows
    nothing.
    """

    parameters: list[torch.nn.Parameter]
    lengths: list[int]
    watched: int
    guessing: float
    device: torch.device

    def loss(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """The loss of some rows, each times its weight, summed."""
        ...


@dataclass(frozen=True)
class Rows:
    """What is learned from, oldest first: tokens and entering states of each text, truth, how much each row counts (1
    on average).

    A row has `texts_a_row` texts, one behind the other.
    """

    tokens: Sequence[Sequence[int]]
    states: States
    truth: torch.Tensor
    counts: torch.Tensor
    texts_a_row: int


def texts_of(rows: Sequence[int], each: int) -> list[int]:
    """The numbers of the texts of some rows, which have `each` of them, one behind the other."""
    return [each * row + n for row in rows for n in range(each)]


def lengths_of(texts: Sequence[Sequence[int]], each: int) -> list[int]:
    """The tokens that each row costs: its longest text, so many times, since that is what the others are padded to."""
    sizes = [len(tokens) for tokens in texts]
    return [each * max(sizes[at : at + each]) for at in range(0, len(sizes), each)]


def counts_of(weights: Sequence[float] | None, rows: int) -> torch.Tensor:
    """How much each row counts, 1 on average. Raises TrainingFailed when weights are no weights."""
    if weights is None:
        return torch.ones(rows)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (rows,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise TrainingFailed(f"{rows} rows need as many weights: finite, none below 0, not all of them 0")
    return torch.from_numpy(given / given.mean()).float()


def watched_of(rows: int, training: Training) -> int:
    """How many of the latest rows early stopping looks at."""
    if training.early_stopping is None:
        return 0
    return min(rows - 1, max(1, round(rows * training.early_stopping.share)))


class Classifier:
    """Adapter and head of an encoder: a row's vector, times the head, is its logits."""

    def __init__(self, encoder: Encoder, head: torch.nn.Linear, rows: Rows, begin: Entering, watched: int) -> None:
        self._encoder = encoder
        self._head = head
        self._rows = rows
        self._begin = begin
        self.parameters = [p for p in encoder.model.parameters() if p.requires_grad] + list(head.parameters())
        self.lengths = lengths_of(rows.tokens, rows.texts_a_row)
        self.watched = watched
        several = rows.truth.dim() == 2
        self.guessing = head.out_features * math.log(2) if several else math.log(head.out_features)
        self.device = encoder.device

    def loss(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """Cross-entropy of the rows' classes."""
        texts = texts_of(rows, self._rows.texts_a_row)
        self._begin.states = self._rows.states.of(texts).to(self.device)
        with computing_in(precision, self.device):
            vectors = self._encoder.pooled([self._rows.tokens[text] for text in texts])
        logits = self._head(self._encoder.joined(vectors.float()))
        return weighted_loss(logits, self._rows.truth[rows], self._rows.counts[rows])


class Critic:
    """The adapter of a generator, and a constant: what it learns is how people judged texts (accrual/reward.py).

    A row has one text or two, one behind the other in `texts`; `by_base` [texts] is how likely each is to the base.
    """

    def __init__(
        self,
        generator: Generator,
        texts: Sequence[Written],
        states: States,
        by_base: torch.Tensor,
        truth: torch.Tensor,
        counts: torch.Tensor,
        beta: float,
        begin: Entering,
        watched: int,
    ) -> None:
        self._generator = generator
        self._texts = texts
        self._states = states
        self._by_base = by_base
        self._truth = truth.float()
        self._counts = counts
        self._beta = beta
        self._begin = begin
        self._each = len(texts) // len(truth)
        self._signs = torch.tensor(SIGNS[self._each], device=generator.device)
        self.bias = torch.nn.Parameter(_log_odds(self._truth, counts))
        self.parameters = [p for p in generator.model.parameters() if p.requires_grad] + [self.bias]
        self.lengths = lengths_of([text.tokens for text in texts], self._each)
        self.watched = watched
        self.guessing = math.log(2)
        self.device = generator.device

    def loss(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """Cross-entropy of the rows' labels."""
        log_odds = self._beta * self._ratios(rows, precision) @ self._signs + self.bias
        return binary_cross_entropy_with_logits(log_odds, self._truth[rows], self._counts[rows], reduction="sum")

    def _ratios(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """By how much each text is likelier than to the base, as a logarithm, [rows, texts a row]."""
        texts = texts_of(rows, self._each)
        self._begin.states = self._states.of(texts).to(self.device)
        with computing_in(precision, self.device):
            own = self._generator.log_likelihoods([self._texts[text] for text in texts])
        return (own - self._by_base[texts]).view(len(rows), self._each)


class Writer:
    """The adapter of a generator: what it learns is each token of the completions, given all before it."""

    def __init__(
        self,
        generator: Generator,
        rows: Sequence[Written],
        states: States,
        counts: torch.Tensor,
        begin: Entering,
        watched: int,
    ) -> None:
        self._generator = generator
        self._rows = rows
        self._states = states
        self._counts = counts
        self._begin = begin
        self.parameters = [p for p in generator.model.parameters() if p.requires_grad]
        self.lengths = [len(row.tokens) for row in rows]
        self.watched = watched
        self.guessing = math.log(generator.model.config.vocab_size)
        self.device = generator.device

    def loss(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """The mean log-loss of each row's tokens: a long completion counts as much as a short one."""
        self._begin.states = self._states.of(rows).to(self.device)
        some = [self._rows[row] for row in rows]
        with computing_in(precision, self.device):
            states, following = self._generator.states_before(some)
            by_token = cross_entropy(self._generator.logits(states).float(), following, reduction="none")
        sizes = [len(row.tokens) - row.start for row in some]
        means = torch.stack([part.mean() for part in torch.split(by_token, sizes)])
        return (means * self._counts[rows]).sum()


def _log_odds(truth: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """What a model that knows only the shares says of the second class, as if there had been one row more of each."""
    ones, rows = (truth * counts).sum(), counts.sum()
    return torch.log((ones + 1) / (rows - ones + 1))
