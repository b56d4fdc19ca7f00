"""How good probabilities are: the figures that the trainer, the monitor and reports share.

All take `probabilities` [rows, classes] and what was true, which `truth_of` makes of labels:

- where a row has one class, each row of probabilities sums to 1 and `truth` [rows] is the index of its label among the
  classes, or `OUTSIDE` for a label that is none of the model's. Such a label had probability 0: it can never be right,
  and it costs what a probability of 0 costs;
- where each class stands by itself (several labels, a score), `truth` [rows, classes] is what each should have been, 0
  to 1. Every class of every row is then a question of two answers, and a row's figure is the mean over its questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accrual.ledger import Bin
from accrual.output import Output

Floats = NDArray[np.floating[Any]]
Truth = NDArray[np.integer[Any]] | Floats

OUTSIDE = -1
BINS = 15
SMALLEST = 1e-6  # log-loss of a probability of 0 is infinite; one wrong row would hide all others
_Z = 1.959964  # of the normal distribution 95% lies within so many standard deviations
_RESAMPLES = 200
_ROWS_IN_A_BIN = 25  # at least, for the debiased calibration error


def indices_of(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """The place of each label among `classes`, `OUTSIDE` where it has none."""
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place.get(label, OUTSIDE) for label in labels], dtype=np.int64)


def truth_of(output: Output, labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64] | NDArray[np.float64]:
    """What is true of rows with these labels, for a model of these classes: [rows] or [rows, classes], see above.

    A name in a label of several that is none of the classes is left out.
    """
    if output.task == "score":
        return np.array([[float(label)] for label in labels], dtype=np.float64).reshape(len(labels), 1)
    if output.task != "multilabel":
        return indices_of(labels, classes)
    named = [set(output.names_in(label)) for label in labels]
    return np.array([[float(name in names) for name in classes] for names in named]).reshape(len(labels), len(classes))


def brier_per_row(probabilities: Floats, truth: Truth) -> NDArray[np.float64]:
    """Each row's Brier score (1950), in its original form for any number of classes: sum over classes of (p - y)^2.

    0 (certain and right) to 2 (certain and wrong). A label outside the classes adds its own term, (0 - 1)^2. Where each
    class stands by itself it is the mean over the classes of 2 (p - y)^2: each is a question of two answers.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if truth.ndim == 2:
        return np.asarray(2 * np.square(p - truth).mean(axis=1), dtype=np.float64)
    return np.asarray((p**2).sum(axis=1) - 2 * _of_truth(p, truth) + 1.0, dtype=np.float64)


def brier(probabilities: Floats, truth: Truth) -> float:
    """The mean Brier score."""
    return float(brier_per_row(probabilities, truth).mean())


def log_loss_per_row(probabilities: Floats, truth: Truth) -> NDArray[np.float64]:
    """Each row's -ln(probability of the label), probabilities below `SMALLEST` counting as that.

    Where each class stands by itself the mean of -y ln p - (1 - y) ln(1 - p).
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if truth.ndim == 2:
        there, not_there = np.log(np.maximum(p, SMALLEST)), np.log(np.maximum(1 - p, SMALLEST))
        return np.asarray(-(truth * there + (1 - truth) * not_there).mean(axis=1), dtype=np.float64)
    return np.asarray(-np.log(np.maximum(_of_truth(p, truth), SMALLEST)), dtype=np.float64)


def log_loss(probabilities: Floats, truth: Truth) -> float:
    """The mean log-loss."""
    return float(log_loss_per_row(probabilities, truth).mean())


def hits_per_row(probabilities: Floats, truth: Truth) -> NDArray[np.bool_]:
    """Whether each row's likeliest class is the label; where each stands by itself, whether all are on the right side
    of 1/2.
    """
    if truth.ndim == 2:
        return np.asarray(((probabilities >= 0.5) == (truth >= 0.5)).all(axis=1))
    return np.asarray(np.argmax(probabilities, axis=1) == truth)


def accuracy(probabilities: Floats, truth: Truth) -> float:
    """Share of rows that are right (`hits_per_row`)."""
    return float(hits_per_row(probabilities, truth).mean())


def rank_correlation(said: Floats, was: Floats) -> float | None:
    """Spearman's rank correlation (1904), ties sharing their ranks. None where one of the two never changes."""
    if len(said) < 2 or np.ptp(said) == 0 or np.ptp(was) == 0:
        return None
    return float(np.corrcoef(_ranks(said), _ranks(was))[0, 1])


def auroc(positive: Floats, is_positive: NDArray[np.bool_]) -> float | None:
    """Chance that a positive row is given a higher `positive` probability than a negative one, ties counting half.

    The rank statistic of Mann and Whitney (1947). None where only one of the two kinds is there.
    """
    ones = int(is_positive.sum())
    zeros = len(is_positive) - ones
    if ones == 0 or zeros == 0:
        return None
    return float((_ranks(positive)[is_positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def ece(probabilities: Floats, truth: Truth) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), in `BINS` bins of equal width.

    With more than two classes: of the likeliest class, its probability against how often it is right. With two: of the
    second class, the one that a two-class contract names as the event, its probability against how often it happens.
    Where each class stands by itself: of all classes of all rows, the probability against how often it is there.
    Chance alone makes it greater than 0, the more so the fewer the rows: models on different rows compare by
    `calibration_error`.
    """
    return ece_of(*event_of(probabilities, truth))


def ece_of(said: NDArray[np.float64], happened: NDArray[np.float64]) -> float:
    """`ece` of events: their probabilities, and whether they happened."""
    return _gap(_equal_widths(said), said - happened)


def calibration_error(probabilities: Floats, truth: Truth) -> float:
    """The expected calibration error without most of what chance adds to it, in bins of equally many rows.

    As Kumar, Liang and Ma 2019, "Verified uncertainty calibration", NeurIPS (arXiv:1909.10155), the variance of a bin's
    own mean is taken off the square of its gap. Theirs is a root mean square; here the root is taken of each bin, which
    keeps the unit of `ece` and strays half as much from sample to sample (0.013 against 0.027 on 400 honest rows).
    """
    return calibration_error_of(*event_of(probabilities, truth))


def calibration_error_of(said: NDArray[np.float64], happened: NDArray[np.float64]) -> float:
    """`calibration_error` of events: their probabilities, and whether they happened."""
    bins = max(1, min(BINS, len(said) // _ROWS_IN_A_BIN))
    edges = np.unique(np.quantile(said, np.linspace(0, 1, bins + 1)[1:-1]))  # equal probabilities stay together
    where = np.searchsorted(edges, said, side="right")
    rows = np.bincount(where)
    where, rows = np.unique(where, return_inverse=True)[1], rows[rows > 0]
    rate = np.bincount(where, weights=happened) / rows
    gap = np.bincount(where, weights=said - happened) / rows
    chance = np.where(rows > 1, rate * (1 - rate) / np.maximum(rows - 1, 1), gap**2)
    return float((rows * np.sqrt(np.maximum(0.0, gap**2 - chance))).sum() / len(said))


def reliability(said: NDArray[np.float64], happened: NDArray[np.float64]) -> list[Bin]:
    """The reliability curve in the bins of `ece`, those without rows left out: what was said, and what happened."""
    where = _equal_widths(said)
    return [
        Bin(float(said[where == b].mean()), float(happened[where == b].mean()), int((where == b).sum()))
        for b in np.unique(where)
    ]


def interval_of_share(share: float, rows: int) -> tuple[float, float]:
    """95% confidence interval of a share of independent rows (Wilson 1927)."""
    middle = (share + _Z**2 / (2 * rows)) / (1 + _Z**2 / rows)
    half = _Z / (1 + _Z**2 / rows) * math.sqrt(share * (1 - share) / rows + _Z**2 / (4 * rows**2))
    return middle - half, middle + half


def interval_of_mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% confidence interval of the mean of independent rows, by the normal approximation."""
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else abs(mean)
    return mean - _Z * error, mean + _Z * error


def interval_of_auroc(positive: Floats, is_positive: NDArray[np.bool_]) -> tuple[float, float] | None:
    """95% confidence interval of `auroc` (DeLong, DeLong and Clarke-Pearson 1988), by ranks (Sun and Xu 2014).

    Each row's part is the share of rows of the other kind that it is on the right side of; the variance is that of the
    parts of either kind. None where a kind has fewer than two rows.
    """
    middle, is_negative = auroc(positive, is_positive), ~is_positive
    if middle is None or min(is_positive.sum(), is_negative.sum()) < 2:
        return None
    ranks, variance = _ranks(positive), 0.0
    for own, others in ((is_positive, is_negative), (is_negative, is_positive)):
        parts = (ranks[own] - _ranks(np.asarray(positive)[own])) / others.sum()
        variance += float(parts.var(ddof=1)) / int(own.sum())
    half = _Z * math.sqrt(variance)
    return max(0.0, middle - half), min(1.0, middle + half)


def interval_of_ece(
    said: NDArray[np.float64], happened: NDArray[np.float64], questions: NDArray[np.int64]
) -> tuple[float, float]:
    """95% confidence interval of `ece` by the basic bootstrap: twice what was found less what resamples show.

    `questions`: how many of the events each row has. Rows are drawn, with all of theirs, since those of a row go
    together.
    """
    bins, differences = _equal_widths(said), said - happened
    found, chance = _gap(bins, differences), np.random.default_rng(len(questions))
    gaps = []
    for _ in range(_RESAMPLES):
        times = np.bincount(chance.integers(len(questions), size=len(questions)), minlength=len(questions))
        gaps.append(_gap(bins, differences, np.repeat(times, questions)))
    low, high = np.quantile(gaps, [0.025, 0.975])
    return max(0.0, 2 * found - float(high)), max(0.0, 2 * found - float(low))


def event_of(probabilities: Floats, truth: Truth) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What calibration is about: the probability of an event that was said, and whether it happened (1 or 0)."""
    p = np.asarray(probabilities, dtype=np.float64)
    if truth.ndim == 2:
        return p.ravel(), np.asarray(truth, dtype=np.float64).ravel()
    if p.shape[1] == 2:
        return p[:, 1], (truth == 1).astype(np.float64)
    return p.max(axis=1), (np.argmax(p, axis=1) == truth).astype(np.float64)


def _equal_widths(said: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.minimum((said * BINS).astype(np.int64), BINS - 1)


def _gap(bins: NDArray[np.int64], differences: NDArray[np.float64], times: NDArray[np.int64] | int = 1) -> float:
    """`times`: how often each counts."""
    times = np.broadcast_to(times, bins.shape)
    return float(np.abs(np.bincount(bins, weights=differences * times)).sum() / times.sum())


def _ranks(values: Floats) -> NDArray[np.float64]:
    """From 1; equal values share the mean of their ranks."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[where], dtype=np.float64)


def _of_truth(probabilities: NDArray[np.float64], truth: Truth) -> NDArray[np.float64]:
    """The probability that each row's label was given: 0 outside the classes."""
    given = probabilities[np.arange(len(truth)), np.maximum(truth, 0).astype(np.int64)]
    return np.where(truth == OUTSIDE, 0.0, given)
