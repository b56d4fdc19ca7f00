"""Live quality, pure: what labeled rows say about the model that predicted them.

A `Tally` is a sum over rows, so that tallies of partitions and of windows add up to that of the whole.
"""

from __future__ import annotations

from typing import Any

import msgspec

from accrual.events import Distribution, GroundTruth, microseconds
from accrual.output import SEPARATOR, is_score

BINS = 15


class Tally(msgspec.Struct, array_like=True):
    """Sums over the labeled rows of one model.

    `brier` sums the multi-class score (Brier 1950): the squared distance of the distribution from the label's, 0 to 2.
    The three lists are per bin of the likeliest class's probability (`BINS` of equal width): rows, the sum of that
    probability, and how often that class was the label. Where each class stands by itself all are as accrual/scores.py
    says, and a row is in the bins once for each class. `delay_s` sums the seconds from prediction to outcome, over the
    `delayed` rows that have one. `seen` counts all rows, `rows` those that were measured: fewer when sampling.
    """

    seen: int = 0
    rows: int = 0
    correct: int = 0
    brier: float = 0.0
    delayed: int = 0
    delay_s: float = 0.0
    bin_rows: list[int] = msgspec.field(default_factory=lambda: [0] * BINS)
    bin_probability: list[float] = msgspec.field(default_factory=lambda: [0.0] * BINS)
    bin_correct: list[float] = msgspec.field(default_factory=lambda: [0.0] * BINS)

    def add(self, row: GroundTruth, output: Distribution | None) -> bool:
        """Measure one labeled row; False when its output or label is of no form that can be."""
        label = row.label or ""
        if output is None or (output.task == "score" and not is_score(label)):
            return False
        says = output.probabilities
        self.rows += 1
        if row.observed_at is not None:
            self.delayed += 1
            self.delay_s += (microseconds(row.observed_at) - microseconds(row.predicted_at)) / 1e6
        if output.task in ("classification", "text"):
            self.brier += sum(p * p for p in says.values()) - 2 * says.get(label, 0.0) + 1
            self.correct += output.label == label
            self._bin(says.get(output.label, 0.0), output.label == label)
            return True
        named = label.split(SEPARATOR)
        truth = {name: float(label) if output.task == "score" else float(name in named) for name in says}
        self.brier += 2 * sum((p - truth[name]) ** 2 for name, p in says.items()) / max(1, len(says))
        self.correct += all((p >= 0.5) == (truth[name] >= 0.5) for name, p in says.items())
        for name, p in says.items():
            self._bin(p, truth[name])
        return True

    def _bin(self, said: float, happened: float) -> None:
        at = min(int(said * BINS), BINS - 1)
        self.bin_rows[at] += 1
        self.bin_probability[at] += said
        self.bin_correct[at] += happened

    def __add__(self, other: Tally) -> Tally:
        mine, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return msgspec.convert([_sum(a, b) for a, b in zip(mine, theirs, strict=True)], Tally)

    def ece(self) -> float:
        """Expected calibration error (Naeini et al. 2015, AAAI): the rows' mean gap between confidence and accuracy."""
        gaps = zip(self.bin_probability, self.bin_correct, strict=True)
        return sum(abs(p - c) for p, c in gaps) / max(1, sum(self.bin_rows))

    def figures(self) -> dict[str, float | int | None]:
        """Rows, accuracy, Brier score, calibration error, mean label delay in seconds; None where no row says."""
        return {
            "seen": self.seen,
            "rows": self.rows,
            "accuracy": self.correct / self.rows if self.rows else None,
            "brier": self.brier / self.rows if self.rows else None,
            "ece": self.ece() if self.rows else None,
            "label_delay_s": self.delay_s / self.delayed if self.delayed else None,
        }


def _sum(a: Any, b: Any) -> Any:
    return [x + y for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a + b
