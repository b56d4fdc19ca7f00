"""Judged: a model's answers to some rows beside what was true, as all figures of a window see them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual import scores
from accrual.ledger import Bin


class Judged(msgspec.Struct, frozen=True):
    """By row: `brier`, `log_loss`, `hits`, whether it is right or how much of it is, 0 to 1, and how many `questions`
    it has; `outside`, whether its label is none of the classes. By question, of which calibration is: `said`, the
    probability of an event, and `happened`, 0 to 1. `binary`: each row is one question, and its event is what counts.
    """

    brier: NDArray[np.float64]
    log_loss: NDArray[np.float64]
    hits: NDArray[np.float64]
    questions: NDArray[np.int64]
    outside: NDArray[np.bool_]
    said: NDArray[np.float64]
    happened: NDArray[np.float64]
    binary: bool = False

    @property
    def accuracy(self) -> float:
        """The share of the rows that are right."""
        return float(self.hits.mean())

    @property
    def auroc(self) -> float | None:
        """See `scores.auroc`; None unless each row is a question of yes or no."""
        return scores.auroc(self.said, self.happened == 1) if self._of_yes_or_no else None

    @property
    def rank_correlation(self) -> float | None:
        """See `scores.rank_correlation`; None unless each row has a number that is neither yes nor no."""
        if not self.binary or self._of_yes_or_no:
            return None
        return scores.rank_correlation(self.said, self.happened)

    @property
    def ece(self) -> float:
        """See `scores.ece`."""
        return scores.ece_of(self.said, self.happened)

    @property
    def calibration_error(self) -> float:
        """See `scores.calibration_error`."""
        return scores.calibration_error_of(self.said, self.happened)

    @property
    def reliability(self) -> list[Bin]:
        """See `scores.reliability`."""
        return scores.reliability(self.said, self.happened)

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% confidence intervals, if rows are independent, of `accuracy`, `brier`, `log_loss`, `ece`, and of `auroc`
        where there is one.

        Of accuracy Wilson's (1927); of AUROC DeLong's (1988); of Brier score and log-loss, means over rows, the normal
        approximation; of ECE the basic bootstrap (Davison and Hinkley 1997, chapter 5), which takes off what chance
        adds: it may lie below the ECE.
        """
        of_auroc = scores.interval_of_auroc(self.said, self.happened == 1) if self._of_yes_or_no else None
        return {
            "accuracy": scores.interval_of_share(self.accuracy, len(self.hits)),
            "brier": scores.interval_of_mean(self.brier),
            "log_loss": scores.interval_of_mean(self.log_loss),
            "ece": scores.interval_of_ece(self.said, self.happened, self.questions),
            **({"auroc": of_auroc} if of_auroc else {}),
        }

    @property
    def _of_yes_or_no(self) -> bool:
        return self.binary and bool(np.isin(self.happened, (0.0, 1.0)).all())


def judged(probabilities: scores.Floats, truth: scores.Truth) -> Judged:
    """What came of probabilities [rows, classes]; `truth` as in accrual/scores.py."""
    said, happened = scores.event_of(probabilities, truth)
    return Judged(
        brier=scores.brier_per_row(probabilities, truth),
        log_loss=scores.log_loss_per_row(probabilities, truth),
        hits=scores.hits_per_row(probabilities, truth).astype(np.float64),
        questions=np.full(len(truth), truth.shape[1] if truth.ndim == 2 else 1),
        outside=truth == scores.OUTSIDE if truth.ndim == 1 else np.zeros(len(truth), dtype=np.bool_),
        said=said,
        happened=happened,
        binary=probabilities.shape[1] == (2 if truth.ndim == 1 else 1),
    )


def together(parts: Sequence[Judged]) -> Judged:
    """Several as one, in their order."""
    return Judged(
        brier=np.concatenate([part.brier for part in parts]),
        log_loss=np.concatenate([part.log_loss for part in parts]),
        hits=np.concatenate([part.hits for part in parts]),
        questions=np.concatenate([part.questions for part in parts]),
        outside=np.concatenate([part.outside for part in parts]),
        said=np.concatenate([part.said for part in parts]),
        happened=np.concatenate([part.happened for part in parts]),
        binary=parts[0].binary,
    )
