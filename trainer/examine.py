"""Examine: one model on the last window that judged it, row by row, beside the champion of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from accrual import scores
from accrual.ledger import Bin
from accrual.predictor import Predictor
from trainer.error_slices import SliceChange, clusters, slice_changes
from trainer.weigh import Row

WORST = 25
GROUPS = 12
_MOST_VALUES = 30  # of an input, for it to make slices


class WorstRow(msgspec.Struct, frozen=True):
    """A row on which the model was most wrong: what it said with which probability, and what it gave the label."""

    prediction_id: str
    text: str
    label: str
    said: str
    probability: float
    of_label: float


class Examination(msgspec.Struct, frozen=True):
    """`after` is the examined model, `before` the champion it was to replace; `rows` judged both."""

    after: str
    before: str
    rows: int
    reliability: dict[str, list[Bin]]
    slices: list[SliceChange]
    worst: list[WorstRow]


def examine(
    after: Predictor, before: Predictor, rows: Sequence[Row], inputs: Sequence[Mapping[str, Any]], seed: int
) -> Examination:
    """Score both models on the rows of a window and compare them. `inputs`: each row's, as the contract names them."""
    texts, labels = [row.text for row in rows], [row.label for row in rows]
    said = {model.model: model.probabilities(texts) for model in (before, after)}
    truth = {model.model: scores.indices_of(labels, model.classes) for model in (before, after)}
    brier = {name: scores.brier_per_row(said[name], truth[name]) for name in said}
    groups: dict[str, Sequence[str | None]] = {"label": labels, **_by_value(inputs)}
    vectors = after.vectors(texts)
    if vectors is not None:
        groups["texts like"] = clusters(vectors, texts, GROUPS, seed)
    worst = np.argsort(-brier[after.model], kind="stable")[:WORST]
    return Examination(
        after=after.model,
        before=before.model,
        rows=len(rows),
        reliability={name: scores.reliability(said[name], truth[name]) for name in said},
        slices=slice_changes(groups, brier[before.model], brier[after.model]),
        worst=[_worst_row(rows[i], said[after.model][i], after.classes) for i in worst],
    )


def _worst_row(row: Row, said: Any, classes: Sequence[str]) -> WorstRow:
    likeliest = int(said.argmax())
    of_label = float(said[classes.index(row.label)]) if row.label in classes else 0.0
    return WorstRow(row.prediction_id, row.text, row.label, classes[likeliest], float(said[likeliest]), of_label)


def _by_value(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[str | None]]:
    """The values of inputs that have few; of those that have more, numbers by quarters."""
    found: dict[str, Sequence[str | None]] = {}
    for name in inputs[0] if inputs else ():
        values = [row.get(name) for row in inputs]
        known = [value for value in values if value is not None]
        if len(set(known)) <= _MOST_VALUES:
            found[name] = ["missing" if value is None else str(value) for value in values]
        elif all(isinstance(value, int | float) for value in known):
            found[name] = _quarters([None if value is None else float(value) for value in values])
    return {name: names for name, names in found.items() if len(set(names)) > 1}


def _quarters(values: Sequence[float | None]) -> list[str | None]:
    edges = np.unique(np.quantile([value for value in values if value is not None], [0, 0.25, 0.5, 0.75, 1]))
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return [
        "missing"
        if value is None
        else names[min(max(int(np.searchsorted(edges, value, side="right")) - 1, 0), len(names) - 1)]
        for value in values
    ]
