"""The pool: rows come in any order and number, and those that may still be chosen are kept: `max_rows` and some more.

So a window of ten million rows takes as much memory as one of `training.max_rows`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from accrual.contract import Contract
from trainer.weigh import Row

KEPT_BACK = 0.12  # of the new rows, the latest: later than what is trained on, earlier than what judges


class Found(msgspec.Struct, frozen=True):
    """A row as it was found. `margin`: how much surer the model was of its likeliest class than of the next.

    `of_label`: the share of its label among all rows that could have been drawn with it. `of_slice`: how many rows of
    the new windows are in its slice.
    """

    row: Row
    at: datetime
    delay_us: int
    margin: float
    excluded: str | None
    of_label: float
    of_slice: int

    @property
    def order(self) -> tuple[datetime, str]:
        """By time, and where that is the same by id."""
        return self.at, self.row.prediction_id


class Pool:
    """Of the rows of new windows: `excluded`, counted by reason; those to calibrate with; those to learn from."""

    def __init__(self, contract: Contract, until: datetime, seed: int) -> None:
        """Rows before `until` are mature; a calibrator is fitted on the latest of these."""
        self.excluded: Counter[str] = Counter()
        self._until = until
        self._most = contract.training.max_rows
        self._rank = _rank_of(contract, seed)
        self._there = self._mature = 0
        self._latest: list[tuple[tuple[datetime, str], Found]] = []  # a heap of mature rows, the earliest on top
        self._best: list[tuple[Any, str, Found]] = []  # a heap, the least preferred on top

    def add(self, found: Found) -> None:
        """Count a row, and keep it as long as no later one is rather chosen."""
        if found.excluded:
            self.excluded[found.excluded] += 1
            return
        self._there += 1
        _push(self._best, (self._rank(found), found.row.prediction_id, found), self._most)
        if found.at < self._until:
            self._mature += 1
            _push(self._latest, (found.order, found), int(self._most * KEPT_BACK))

    def chosen(self) -> tuple[list[Found], list[Found]]:
        """The rows to learn from, and those to calibrate with, the latest of the mature; both in order of time."""
        size = min(self._there, self._most)
        kept_back = int(min(size, self._mature) * KEPT_BACK)
        latest = heapq.nlargest(kept_back, self._latest, key=lambda held: held[0])
        calibrate = [found for _, found in reversed(latest)]
        apart = {found.row.prediction_id for found in calibrate}
        others = (held for held in self._best if held[1] not in apart)
        best = heapq.nlargest(size - kept_back, others, key=lambda held: held[:2])
        return sorted((found for *_, found in best), key=lambda found: found.order), calibrate


def _rank_of(contract: Contract, seed: int) -> Callable[[Found], Any]:
    """What is greater the rather a row is learned from: the newest, those that the model was least sure of, or those of
    the slices with the fewest rows.

    Both depend on the inputs only. The model's mistakes are not preferred: a choice by label would teach that they are
    common. Weights by arrival stand for a sample drawn at random, so with them it is.
    """
    if contract.training.cohort == "ipw":
        return lambda found: -int.from_bytes(hashlib.md5(f"{found.row.prediction_id}:{seed}".encode()).digest())
    if contract.training.prefer == "uncertain":
        return lambda found: (-found.margin, found.order)
    if contract.training.prefer == "rare":
        return lambda found: (-found.of_slice, found.order)
    return lambda found: found.order


def _push(heap: list[Any], item: Any, most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif most:
        heapq.heappushpop(heap, item)
