"""Evaluate: one frozen model on one sealed window, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual import scores
from accrual.ledger import Evaluation
from accrual.predictor import Predictor
from trainer.select import Window
from trainer.weigh import Row


class Scored(msgspec.Struct, frozen=True):
    """What a model said of a window's rows, and what was true; figures and the gate's evidence follow from it."""

    model: str
    window: Window
    probabilities: NDArray[np.float64]
    truth: NDArray[np.int64]

    @property
    def brier(self) -> NDArray[np.float64]:
        """Each row's Brier score."""
        return scores.brier_per_row(self.probabilities, self.truth)

    def entry(
        self,
        run_id: str,
        role: Literal["challenger", "champion", "generation-0"],
        at: datetime,
        **verdict: Any,
    ) -> Evaluation:
        """The ledger's record of it; `verdict` is `e_value` and `verdict`, for a challenger."""
        two = self.probabilities.shape[1] == 2
        return Evaluation(
            stream=self.window.stream,
            run_id=run_id,
            window=self.window.window,
            model=self.model,
            role=role,
            rows=len(self.truth),
            accuracy=scores.accuracy(self.probabilities, self.truth),
            auroc=scores.auroc(self.probabilities[:, 1], self.truth == 1) if two else None,
            brier=float(self.brier.mean()),
            log_loss=scores.log_loss(self.probabilities, self.truth),
            ece=scores.ece(self.probabilities, self.truth),
            coverage=self.window.coverage,
            at=at,
            **verdict,
        )


def score(predictor: Predictor, window: Window, rows: Sequence[Row]) -> Scored:
    """Let a frozen model predict a window's rows."""
    return Scored(
        predictor.model,
        window,
        predictor.probabilities([row.text for row in rows]),
        scores.indices_of([row.label for row in rows], predictor.classes),
    )


def ece_of(parts: Sequence[Scored]) -> float:
    """Calibration error of one model over several windows together."""
    return scores.ece(
        np.concatenate([part.probabilities for part in parts]), np.concatenate([part.truth for part in parts])
    )
