"""Evaluate: one frozen model on one sealed window, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.bundle import lineage
from accrual.judged import Judged, together
from accrual.ledger import Evaluation, SliceScores
from accrual.predictor import Predictor
from trainer.gate import LARGEST_LOSS
from trainer.select import Window
from trainer.weigh import Row

MOST_SLICES = 100  # a field of many values by mistake must not make an entry that no broker takes


class Scored(msgspec.Struct, frozen=True):
    """What a model said of a window's rows, beside what was true; figures and the gate's evidence follow from it.

    `slices` are the names (`grade=C`) of those that each row is in.
    """

    model: str
    window: Window
    ids: list[str]
    judged: Judged
    slices: list[tuple[str, ...]]

    def entry(
        self,
        run_id: str,
        role: Literal["challenger", "champion", "generation-0"],
        at: datetime,
        loss_at_most: Mapping[str, float] | None = None,
        **verdict: Any,
    ) -> Evaluation:
        """The ledger's record of it. Of a challenger: `loss_at_most` by slice, and `e_value` and `verdict`."""
        found = self.judged
        return Evaluation(
            stream=self.window.stream,
            run_id=run_id,
            window=self.window.window,
            model=self.model,
            role=role,
            rows=len(self.ids),
            accuracy=found.accuracy,
            auroc=found.auroc,
            brier=float(found.brier.mean()),
            log_loss=float(found.log_loss.mean()),
            ece=found.ece,
            coverage=self.window.coverage,
            calibration_error=found.calibration_error,
            rank_correlation=found.rank_correlation,
            intervals=found.intervals,
            reliability=found.reliability,
            slices=self._slice_scores(loss_at_most or {}),
            at=at,
            **verdict,
        )

    def _slice_scores(self, loss_at_most: Mapping[str, float]) -> list[SliceScores]:
        largest = Counter(name for names in self.slices for name in names).most_common(MOST_SLICES)
        found = []
        for name, rows in sorted(largest):
            inside = _inside(self.slices, name)
            accuracy, brier = self.judged.hits[inside].mean(), self.judged.brier[inside].mean()
            found.append(SliceScores(name, rows, float(accuracy), float(brier), loss_at_most.get(name)))
        return found


def score(predictor: Predictor, window: Window, rows: Sequence[Row]) -> Scored:
    """Let a frozen model predict a window's rows."""
    return Scored(
        predictor.model,
        window,
        [row.prediction_id for row in rows],
        predictor.judge([row.text for row in rows], [row.label for row in rows]),
        [row.slices for row in rows],
    )


def gains_of(ours: Sequence[Scored], theirs: Sequence[Scored]) -> list[NDArray[np.float64]]:
    """For each window the rows' Brier scores of `theirs` less those of `ours`: the evidence of the gate."""
    return [their.judged.brier - our.judged.brier for our, their in zip(ours, theirs, strict=True)]


def losses_of(ours: Sequence[Scored], theirs: Sequence[Scored]) -> list[float]:
    """For each window the most that any of its rows can lose, `-gains_of`, by what both models said and whatever is
    true.

    Where a row is one question of two answers, p of ours and q of theirs give g = 2 (q - y)^2 - 2 (p - y)^2, which is
    least at y = 0 or y = 1. Elsewhere the loss that is possible for any two forecasts.
    """
    return [_most_lost(our.judged, their.judged) for our, their in zip(ours, theirs, strict=True)]


def by_slice(parts: Sequence[Scored], gains: Sequence[NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The gains of each slice's rows, over all windows."""
    slices = [names for part in parts for names in part.slices]
    together = np.concatenate(gains)
    return {
        name: together[_inside(slices, name)]
        for name, _ in sorted(Counter(name for names in slices for name in names).most_common(MOST_SLICES))
    }


def calibration_error_of(parts: Sequence[Scored]) -> float:
    """Calibration error of one model over several windows together, without what chance adds to it."""
    return together([part.judged for part in parts]).calibration_error


def learned_from(store: Path, bundle: str, parts: Sequence[Scored]) -> list[str]:
    """The ids among the judged rows that a model learned from, in order: there must be none."""
    return sorted(lineage(store, bundle) & {prediction_id for part in parts for prediction_id in part.ids})


def _most_lost(ours: Judged, theirs: Judged) -> float:
    if not (ours.binary and theirs.binary and len(ours.said)):
        return LARGEST_LOSS
    p, q = ours.said, theirs.said
    return float(2 * (np.abs(p - q) * np.where(p > q, p + q, 2 - p - q)).max())


def _inside(slices: Sequence[tuple[str, ...]], name: str) -> NDArray[np.bool_]:
    return np.array([name in names for names in slices])
