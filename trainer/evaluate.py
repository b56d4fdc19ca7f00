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

from accrual import scores
from accrual.bundle import lineage
from accrual.ledger import Evaluation, SliceScores
from accrual.predictor import Predictor
from trainer.select import Window
from trainer.weigh import Row

MOST_SLICES = 100  # a field of many values by mistake must not make an entry that no broker takes


class Scored(msgspec.Struct, frozen=True):
    """What a model said of a window's rows, and what was true; figures and the gate's evidence follow from it.

    `slices` are the names (`grade=C`) of those that each row is in.
    """

    model: str
    window: Window
    ids: list[str]
    probabilities: NDArray[np.float64]
    truth: NDArray[np.int64] | NDArray[np.float64]
    slices: list[tuple[str, ...]]

    @property
    def brier(self) -> NDArray[np.float64]:
        """Each row's Brier score."""
        return scores.brier_per_row(self.probabilities, self.truth)

    def entry(
        self,
        run_id: str,
        role: Literal["challenger", "champion", "generation-0"],
        at: datetime,
        loss_at_most: Mapping[str, float] | None = None,
        **verdict: Any,
    ) -> Evaluation:
        """The ledger's record of it. Of a challenger: `loss_at_most` by slice, and `e_value` and `verdict`."""
        two = self.probabilities.shape[1] == 2 and self.truth.ndim == 1
        return Evaluation(
            stream=self.window.stream,
            run_id=run_id,
            window=self.window.window,
            model=self.model,
            role=role,
            rows=len(self.truth),
            accuracy=scores.accuracy(self.probabilities, self.truth),
            auroc=scores.auroc(self.probabilities[:, 1], self.truth == 1) if two else None,
            rank_correlation=self._rank_correlation(),
            brier=float(self.brier.mean()),
            log_loss=scores.log_loss(self.probabilities, self.truth),
            ece=scores.ece(self.probabilities, self.truth),
            coverage=self.window.coverage,
            calibration_error=scores.calibration_error(self.probabilities, self.truth),
            intervals=scores.intervals(self.probabilities, self.truth),
            reliability=scores.reliability(self.probabilities, self.truth),
            slices=self._slice_scores(loss_at_most or {}),
            at=at,
            **verdict,
        )

    def _rank_correlation(self) -> float | None:
        if self.probabilities.shape[1] > 1:
            return None
        return scores.rank_correlation(self.probabilities.ravel(), np.asarray(self.truth, dtype=np.float64).ravel())

    def _slice_scores(self, loss_at_most: Mapping[str, float]) -> list[SliceScores]:
        largest = Counter(name for names in self.slices for name in names).most_common(MOST_SLICES)
        found = []
        for name, rows in sorted(largest):
            inside = _inside(self.slices, name)
            said, truth = self.probabilities[inside], self.truth[inside]
            accuracy, brier = scores.accuracy(said, truth), scores.brier(said, truth)
            found.append(SliceScores(name, rows, accuracy, brier, loss_at_most.get(name)))
        return found


def score(predictor: Predictor, window: Window, rows: Sequence[Row]) -> Scored:
    """Let a frozen model predict a window's rows."""
    return Scored(
        predictor.model,
        window,
        [row.prediction_id for row in rows],
        predictor.probabilities([row.text for row in rows]),
        scores.truth_of(predictor.contract.output, [row.label for row in rows], predictor.classes),
        [row.slices for row in rows],
    )


def gains_of(ours: Sequence[Scored], theirs: Sequence[Scored]) -> list[NDArray[np.float64]]:
    """For each window the rows' Brier scores of `theirs` less those of `ours`: the evidence of the gate."""
    return [their.brier - our.brier for our, their in zip(ours, theirs, strict=True)]


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
    return scores.calibration_error(
        np.concatenate([part.probabilities for part in parts]), np.concatenate([part.truth for part in parts])
    )


def learned_from(store: Path, bundle: str, parts: Sequence[Scored]) -> list[str]:
    """The ids among the judged rows that a model learned from, in order: there must be none."""
    return sorted(lineage(store, bundle) & {prediction_id for part in parts for prediction_id in part.ids})


def _inside(slices: Sequence[tuple[str, ...]], name: str) -> NDArray[np.bool_]:
    return np.array([name in names for names in slices])
