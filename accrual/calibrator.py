"""The calibrator: a model's logits become probabilities that can be believed. `trainer/calibrate.py` fits it.

    softmax(logits / temperature), and where there are curves each class's probability through its own, summing to 1

Where each class stands by itself (several labels, a score) it is 1 / (1 + exp(-logit / temperature)), and nothing sums.

It is plain numbers and numpy, since every service applies it to every prediction.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.scores import SMALLEST

_LARGEST = 500.0  # of a logit: the exponential of more is no double

Method = Literal["none", "temperature", "platt", "beta", "isotonic"]


class Sigmoid(msgspec.Struct, frozen=True, tag="sigmoid"):
    """1 / (1 + exp(-(a ln p - b ln(1 - p) + c))), rising since `a` and `b` are not negative.

    Beta calibration (Kull, Silva Filho and Flach 2017, AISTATS); with `a` = `b` it is Platt's (1999) on the log-odds.
    """

    a: float
    b: float
    c: float

    def __call__(self, said: NDArray[np.float64]) -> NDArray[np.float64]:
        inside = np.clip(said, SMALLEST, 1 - SMALLEST)
        logit = self.a * np.log(inside) - self.b * np.log1p(-inside) + self.c
        return np.asarray(1 / (1 + np.exp(-logit)), dtype=np.float64)


class Steps(msgspec.Struct, frozen=True, tag="steps"):
    """Straight lines between the points (`said`, `meant`), which both rise: isotonic regression.

    Zadrozny and Elkan 2002, "Transforming classifier scores into accurate multiclass probability estimates", KDD.
    """

    said: list[float]
    meant: list[float]

    def __call__(self, said: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.interp(said, self.said, self.meant), dtype=np.float64)


class Calibrator(msgspec.Struct, frozen=True):
    """How a model's logits become probabilities.

    `temperature`: logits are divided by it (Guo et al. 2017, arXiv:1706.04599). `curves`: none, one for the second of
    two classes, or one for each of more. `each`: every class stands by itself, with a curve of its own. `rows` is how
    many it was fitted on.
    """

    method: Method = "temperature"
    temperature: float = 1.0
    curves: list[Sigmoid | Steps] = []
    rows: int = 0
    each: bool = False

    @property
    def description(self) -> str:
        """One line for people."""
        if self.method == "none":
            return "none"
        curve = "" if self.method == "temperature" else f"{self.method} over "
        return f"{curve}temperature {self.temperature}, fitted on {self.rows} rows later than those it was trained on"

    def probabilities(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """[rows, classes] of logits [rows, classes]; each row sums to 1, unless `each`."""
        said = uncurved(logits, self.temperature, self.each)
        if not self.curves:
            return said
        if said.shape[1] == 2 and not self.each:
            second = self.curves[0](said[:, 1])
            return np.column_stack([1 - second, second])
        meant = np.column_stack([curve(column) for curve, column in zip(self.curves, said.T, strict=True)])
        if self.each:
            return meant
        meant = np.maximum(meant, SMALLEST)
        return np.asarray(meant / meant.sum(axis=1, keepdims=True), dtype=np.float64)


def uncurved(logits: NDArray[np.floating[Any]], temperature: float, each: bool) -> NDArray[np.float64]:
    """Probabilities of logits [rows, classes] at a temperature, `each` by itself or one of all."""
    scaled = logits.astype(np.float64) / temperature
    if each:
        return np.asarray(1 / (1 + np.exp(-np.clip(scaled, -_LARGEST, _LARGEST))), dtype=np.float64)
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True), dtype=np.float64)
