"""How good probabilities are: the figures that the trainer, the monitor and reports share.

All take `probabilities` [rows, classes], each row summing to 1, and `truth` [rows]: the index of the row's label among
the classes, or `OUTSIDE` for a label that is none of the model's classes. Such a label had probability 0: it can never
be right, and it costs what a probability of 0 costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.integer[Any]]

OUTSIDE = -1
BINS = 15
SMALLEST = 1e-6  # log-loss of a probability of 0 is infinite; one wrong row would hide all others


class ReliabilityBin(msgspec.Struct, frozen=True):
    """Rows that were given about the same probability: its mean, and how often it happened."""

    said: float
    happened: float
    rows: int


def indices_of(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """The place of each label among `classes`, `OUTSIDE` where it has none."""
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place.get(label, OUTSIDE) for label in labels], dtype=np.int64)


def brier_per_row(probabilities: Floats, truth: Indices) -> NDArray[np.float64]:
    """Each row's Brier score (1950), in its original form for any number of classes: sum over classes of (p - y)^2.

    0 (certain and right) to 2 (certain and wrong). A label outside the classes adds its own term, (0 - 1)^2.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    return np.asarray((p**2).sum(axis=1) - 2 * _of_truth(p, truth) + 1.0, dtype=np.float64)


def brier(probabilities: Floats, truth: Indices) -> float:
    """The mean Brier score."""
    return float(brier_per_row(probabilities, truth).mean())


def log_loss(probabilities: Floats, truth: Indices) -> float:
    """Mean of -ln(probability of the label), probabilities below `SMALLEST` counting as that."""
    p = np.asarray(probabilities, dtype=np.float64)
    return float(-np.log(np.maximum(_of_truth(p, truth), SMALLEST)).mean())


def accuracy(probabilities: Floats, truth: Indices) -> float:
    """Share of rows whose likeliest class is the label."""
    return float((np.argmax(probabilities, axis=1) == truth).mean())


def auroc(positive: Floats, is_positive: NDArray[np.bool_]) -> float | None:
    """Chance that a positive row is given a higher `positive` probability than a negative one, ties counting half.

    The rank statistic of Mann and Whitney (1947). None where only one of the two kinds is there.
    """
    ones = int(is_positive.sum())
    zeros = len(is_positive) - ones
    if ones == 0 or zeros == 0:
        return None
    _, where, counts = np.unique(positive, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return float((ranks[is_positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def ece(probabilities: Floats, truth: Indices) -> float:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017), in `BINS` bins of equal width.

    With more than two classes: of the likeliest class, its probability against how often it is right. With two: of the
    second class, the one that a two-class contract names as the event, its probability against how often it happens.
    """
    said, happened, bins = _binned(probabilities, truth)
    gaps = np.bincount(bins, weights=said - happened, minlength=BINS)
    return float(np.abs(gaps).sum() / len(said))


def reliability(probabilities: Floats, truth: Indices) -> list[ReliabilityBin]:
    """The reliability curve (Murphy and Winkler 1977): the bins of `ece` that hold rows."""
    said, happened, bins = _binned(probabilities, truth)
    return [
        ReliabilityBin(float(said[bins == k].mean()), float(happened[bins == k].mean()), int((bins == k).sum()))
        for k in np.unique(bins)
    ]


def _binned(probabilities: Floats, truth: Indices) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Each row's probability, whether it happened, and its bin, as `ece` says."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.shape[1] == 2:
        said, happened = p[:, 1], truth == 1
    else:
        said, happened = p.max(axis=1), np.argmax(p, axis=1) == truth
    return said, happened, np.minimum((said * BINS).astype(np.int64), BINS - 1)


def _of_truth(probabilities: NDArray[np.float64], truth: Indices) -> NDArray[np.float64]:
    """The probability that each row's label was given: 0 outside the classes."""
    given = probabilities[np.arange(len(truth)), np.maximum(truth, 0)]
    return np.where(truth == OUTSIDE, 0.0, given)
