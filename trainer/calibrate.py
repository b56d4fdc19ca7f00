"""Calibrate: probabilities that mean what they say, fitted on rows later than training and earlier than judging.

Few rows say little. So the temperature keeps to the champion's (generation 0 has 1) unless they speak against it, and
a method with more freedom (Platt's sigmoid, beta calibration, isotonic regression: accrual/calibrator.py has the
papers) is taken only if on rows held out it beats the simpler one by more than chance, and gets no fewer of them right:
isotonic on a small window of banking77 lowered accuracy from 0.907 to 0.865. The loss that a method was fitted with
says nothing, since more freedom always lowers that.

What is fitted, and compared, is the log-loss of "the likeliest class is the label": of two classes that is their
log-loss, and of many it also knows the rows whose label is none of the model's classes, since a new intent has opened.
Leaving these out, as they have no probability of their own, made models too sure of what they would meet.
docs/judging.md has the measurements. Where each class stands by itself it is the log-loss of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from sklearn.isotonic import IsotonicRegression

from accrual.calibrator import Calibrator, Method, Sigmoid, Steps, uncurved
from accrual.scores import SMALLEST, accuracy, log_loss_per_row
from trainer.learner import counts_of

COLDEST, HOTTEST = 0.05, 20.0
# How far a window's temperature strays from that of the one before, in its logarithm: the prior's standard deviation.
# Measured on support-intents: 48 rows alone said 0.50, with the prior 0.68; best for the window after was 0.8.
STRAYS = 0.2
FEWEST_ROWS = 20  # fewer give no curve, whatever the contract says
FEWEST_TO_CHOOSE, FEWEST_A_CLASS = 100, 10  # rows, and rows for each class's curve, before a curve may be chosen
FOLDS = 5
CHANCE = 1.0  # standard errors of the difference by which more freedom must win
_MORE_FREEDOM: tuple[Method, ...] = ("platt", "beta", "isotonic")

Logits = NDArray[np.float32]
Truth = NDArray[np.int64] | NDArray[np.float64]
Floats = NDArray[np.float64]


def calibrate(
    logits: Logits,
    truth: Truth,
    method: Literal["auto"] | Method = "auto",
    champion: Calibrator | None = None,
    weights: Sequence[float] | None = None,
) -> Calibrator:
    """The calibrator of `method`, or with `auto` the one that rows held out speak for. Rows are in order of time.

    `weights`: how much each row counts, by `training.control`; all the same by default.
    """
    if method == "none":
        return Calibrator(method="none", each=truth.ndim == 2)
    before = champion.temperature if champion is not None else 1.0
    counts = counts_of(weights or None, len(truth)).numpy().astype(np.float64)
    if method == "auto":
        method = _chosen(logits, truth, counts, before)
    return _fitted(method if len(truth) >= FEWEST_ROWS else "temperature", logits, truth, counts, before)


def loss_per_row(probabilities: Floats, truth: Truth) -> Floats:
    """-ln of the probability that was given to what came of the likeliest class: it was the label, or it was not.

    Where each class stands by itself, the mean of what came of all.
    """
    if truth.ndim == 2:
        return log_loss_per_row(probabilities, truth)
    sure = np.clip(probabilities.max(axis=1), SMALLEST, 1 - SMALLEST)
    right = probabilities.argmax(axis=1) == truth
    return np.asarray(-np.where(right, np.log(sure), np.log1p(-sure)), dtype=np.float64)


def _chosen(logits: Logits, truth: Truth, counts: Floats, before: float) -> Method:
    """The method with the least freedom that no other beats."""
    best: Method = "temperature"
    if len(truth) < max(FEWEST_TO_CHOOSE, FEWEST_A_CLASS * logits.shape[1]):
        return best
    held_out = _held_out(best, logits, truth, counts, before)
    for candidate in _MORE_FREEDOM:
        tried = _held_out(candidate, logits, truth, counts, before)
        if _beats(tried, held_out, truth, counts):
            best, held_out = candidate, tried
    return best


def _held_out(method: Method, logits: Logits, truth: Truth, counts: Floats, before: float) -> Floats:
    """What the method says of each row when it is fitted on the other folds; a fold is a stretch of time."""
    fold = np.arange(len(truth)) * FOLDS // len(truth)
    said = np.empty(logits.shape, dtype=np.float64)
    for aside in (fold == n for n in range(FOLDS)):
        fitted = _fitted(method, logits[~aside], truth[~aside], counts[~aside], before)
        said[aside] = fitted.probabilities(logits[aside])
    return said


def _beats(more: Floats, less: Floats, truth: Truth, counts: Floats) -> bool:
    """Whether the method with more freedom wins by more than chance, and gets no fewer rows right."""
    gain = counts * (loss_per_row(less, truth) - loss_per_row(more, truth))
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    return bool(gain.mean() > CHANCE * error and accuracy(more, truth) >= accuracy(less, truth))


def _fitted(method: Method, logits: Logits, truth: Truth, counts: Floats, before: float) -> Calibrator:
    temperature, each = _temperature(logits, truth, counts, before), truth.ndim == 2
    curves: list[Sigmoid | Steps] = []
    if method != "temperature":
        said = uncurved(logits, temperature, each)
        fit = _isotonic if method == "isotonic" else _platt if method == "platt" else _beta
        # Of two classes the second's curve is enough; of more, each against the rest.
        which = [1] if said.shape[1] == 2 and not each else range(said.shape[1])
        happened = np.asarray(truth, dtype=np.float64) if each else np.eye(said.shape[1] + 1)[truth.astype(np.int64)]
        curves = [fit(said[:, k], happened[:, k], counts) for k in which]
    return Calibrator(method=method, temperature=temperature, curves=curves, rows=len(truth), each=each)


def _temperature(logits: Logits, truth: Truth, counts: Floats, before: float) -> float:
    """The most likely temperature in [COLDEST, HOTTEST], under a normal prior on its logarithm around `before`'s."""

    def unlikely(logarithm: float) -> float:
        strayed = (logarithm - math.log(before)) / STRAYS
        loss = counts @ loss_per_row(uncurved(logits, math.exp(logarithm), truth.ndim == 2), truth) if len(truth) else 0
        return float(loss + strayed**2 / 2)

    found = minimize_scalar(unlikely, bounds=(math.log(COLDEST), math.log(HOTTEST)), method="bounded")
    return round(math.exp(found.x), 4)


def _platt(said: Floats, happened: Floats, counts: Floats) -> Sigmoid:
    """A scale and a shift of the log-odds."""
    a, c = _sigmoid(_logs(said).sum(axis=1, keepdims=True), happened, counts)
    return Sigmoid(a=a, b=a, c=c)


def _beta(said: Floats, happened: Floats, counts: Floats) -> Sigmoid:
    """A scale for either end, and a shift."""
    a, b, c = _sigmoid(_logs(said), happened, counts)
    return Sigmoid(a=a, b=b, c=c)


def _logs(said: Floats) -> Floats:
    """ln p and -ln(1 - p), [rows, 2]; their sum is the log-odds."""
    inside = np.clip(said, SMALLEST, 1 - SMALLEST)
    return np.column_stack([np.log(inside), -np.log1p(-inside)])


def _sigmoid(features: Floats, happened: Floats, counts: Floats) -> list[float]:
    """Scales (not negative) of the features and a shift: the most likely under a normal prior around "as it is".

    The prior (scales 1, shift 0, variance 1) keeps a class of which there is no row, or every one, from running away.
    """
    inputs = np.column_stack([features, np.ones(len(features))])
    as_it_is = np.array([1.0] * features.shape[1] + [0.0])

    def loss(weights: Floats) -> tuple[float, Floats]:
        logit, away = inputs @ weights, weights - as_it_is
        value = counts @ (np.logaddexp(0.0, logit) - happened * logit) + away @ away / 2
        return float(value), inputs.T @ (counts * (1 / (1 + np.exp(-logit)) - happened)) + away

    bounds = [(0.0, None)] * features.shape[1] + [(None, None)]
    found = minimize(loss, as_it_is, jac=True, bounds=bounds, method="L-BFGS-B")
    return [round(float(x), 6) for x in found.x]


def _isotonic(said: Floats, happened: Floats, counts: Floats) -> Steps:
    """The best rising curve. It says neither 0 nor 1, as n rows cannot know that (Laplace's rule of succession)."""
    least = 1 / (len(said) + 2)
    model = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(said, happened, counts)
    return Steps(said=model.X_thresholds_.tolist(), meant=model.y_thresholds_.tolist())
