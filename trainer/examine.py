"""Examine: one model on the last window that judged it, row by row, beside the champion of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from accrual.config import Config
from accrual.contract import Contract, Text, shown
from accrual.lake import Lake, open_lake
from accrual.ledger import Bin
from accrual.predictor import Predictor
from trainer.error_slices import SliceChange, clusters, slice_changes
from trainer.evaluate import most_lost
from trainer.generations import Candidate, candidate, predictor_of
from trainer.select import LAKE_MEMORY, Window, rows_of, sealed_windows
from trainer.weigh import Row

MOST_EXAMINED = 50_000  # rows of a window; each is held with its inputs and its vector
WORST = 25
GROUPS = 12
_MOST_VALUES = 30  # of an input, for it to make slices


class WorstRow(msgspec.Struct, frozen=True):
    """A row on which the model was most wrong: what it said with which probability, and what it gave the label.

    Of a label of several the least that it gave to one of them; of a score, 1 less the distance.
    """

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


def examine_last_window(
    config: Config, contract: Contract, lake: Lake, known: Sequence[Candidate], model: Candidate
) -> Examination:
    """A model beside the champion of the time, which is among `known`, on the last window that judged it.

    Raises NotFound, LakeUnavailable, and BundleError when a bundle is gone or altered.
    """
    trial = model.trials[-1]
    window = next(w for w in sealed_windows(lake, model.stream) if w.window == trial.challenger.window)
    with open_lake(config, at_snapshot=window.snapshot_id, memory=LAKE_MEMORY) as then:
        rows = list(rows_of(then, contract, window, MOST_EXAMINED))
        recorded = _recorded(then, window, [row.prediction_id for row in rows])
    champion = candidate(known, trial.champion.model)
    after, before = predictor_of(config, model), predictor_of(config, champion)
    return examine(after, before, contract, rows, recorded)


def examine(
    after: Predictor, before: Predictor, contract: Contract, rows: Sequence[Row], recorded: Sequence[bytes]
) -> Examination:
    """Score both models on the rows of a window and compare them. `recorded`: each row's inputs, as JSON; `contract` is
    today's.
    """
    labels, output = [row.label for row in rows], after.contract.output
    inputs, seed = [contract.decode_inputs(raw) for raw in recorded], contract.training.seed
    texts_of = {model.model: [model.contract.render_recorded(raw) for raw in recorded] for model in (before, after)}
    classes, texts = [*before.classes, *after.classes], texts_of[after.model]
    judged = {model.model: model.judge(texts_of[model.model], labels, classes) for model in (before, after)}
    now, then = judged[after.model], judged[before.model]
    groups: dict[str, Sequence[str | None]] = _by_value(inputs)
    if output.task == "score":
        groups["label"] = _quarters([float(label) for label in labels])
    elif output.task != "text":
        groups["label"] = labels
    vectors = after.vectors(texts)
    if vectors is not None:
        groups["texts like"] = clusters(vectors, [shown(text) for text in texts], GROUPS, seed)
    worst = np.argsort(-now.brier, kind="stable")[:WORST]
    return Examination(
        after=after.model,
        before=before.model,
        rows=len(rows),
        reliability={name: found.reliability for name, found in judged.items()},
        slices=slice_changes(groups, then.brier, now.brier, max(most_lost(now, then), most_lost(then, now))),
        worst=_worst_rows([rows[i] for i in worst], [texts[i] for i in worst], after),
    )


def _recorded(lake: Lake, window: Window, ids: Sequence[str]) -> list[bytes]:
    """The inputs of some of a window's rows as JSON, in the order of `ids`."""
    with lake.with_tables({"wanted": pa.table({"prediction_id": pa.array(ids, pa.string())})}):
        found = lake.rows(
            "select prediction_id, inputs from ground_truth where stream = ? and predicted_at >= ? and predicted_at < ?"
            " and prediction_id in (select prediction_id from wanted)",
            [window.stream, window.from_time, window.to_time],
        )
    by_id = {row["prediction_id"]: row["inputs"] for row in found}
    return [by_id[one].encode() for one in ids]


def _worst_rows(rows: Sequence[Row], texts: Sequence[Text], model: Predictor) -> list[WorstRow]:
    output = model.contract.output
    found = []
    for row, text, said in zip(rows, texts, model.answers(texts), strict=True):
        p = said.probabilities
        of_names = [p.get(name, 0.0) for name in output.names_in(row.label)]
        of_label = 1 - abs(p["score"] - float(row.label)) if output.task == "score" else min(of_names, default=1.0)
        largest = max(p.values())
        found.append(WorstRow(row.prediction_id, shown(text), row.label, said.label, largest, of_label))
    return found


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
    names = [f"{low:g} to {high:g}" for low, high in pairwise(edges)] or [f"{edges[0]:g}"]
    return [
        "missing"
        if value is None
        else names[min(max(int(np.searchsorted(edges, value, side="right")) - 1, 0), len(names) - 1)]
        for value in values
    ]
