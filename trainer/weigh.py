"""Weigh: what each chosen row counts. Pure.

control      by whether the model's own decision shaped the outcome (`training.control`)
duplicates   rows of the same text and label become one, which counts as much as all of them
balance      rare labels count more (`training.balance`), and the head is told of it afterwards
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from accrual.contract import Contract, Text
from accrual.training_policy import Control

MOST_WEIGHT = 20.0  # of one row: none must decide a model
_POWERS = {"none": 0.0, "sqrt": 0.5, "equal": 1.0}


class Row(msgspec.Struct, frozen=True):
    """A labeled prediction as of one revision, its inputs rendered to text. `weight`: how many rows it stands for.

    `slices` are the names of those of the gate that it is in.
    """

    prediction_id: str
    text: Text
    label: str
    revision: int = 1
    weight: float = 1.0
    slices: tuple[str, ...] = ()


def control_weight(control: Control | None, inputs: Mapping[str, Any]) -> float:
    """What a row counts by its inputs: see `Control`. What an input does not say is taken for no."""
    if control is None:
        return 1.0
    held_out = control.holdout is not None and inputs.get(control.holdout) is True
    if held_out:
        propensity = None if control.propensity is None else inputs.get(control.propensity)
        return 1.0 if propensity is None else 1 / min(1.0, max(float(propensity), 1 / MOST_WEIGHT))
    exposed = control.exposure is None or inputs.get(control.exposure) is True
    return control.weight if exposed else 1.0


def without_duplicates(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """`rows`, oldest first, with one for each text and label: the newest, with the weight of all. And the others.

    The others weigh 0. Losses are as if every row was there, so no share of labels is changed by it.
    """
    total: dict[tuple[Text, str], float] = {}
    newest: dict[tuple[Text, str], int] = {}
    for place, row in enumerate(rows):
        key = row.text, row.label
        total[key] = total.get(key, 0.0) + row.weight
        newest[key] = place
    kept = [
        msgspec.structs.replace(row, weight=total[row.text, row.label])
        for place, row in enumerate(rows)
        if newest[row.text, row.label] == place
    ]
    others = [
        msgspec.structs.replace(row, weight=0.0)
        for place, row in enumerate(rows)
        if newest[row.text, row.label] != place
    ]
    return kept, others


def weight_by_label(rows: Sequence[Row]) -> dict[str, float]:
    """The sum of the weights of each label's rows."""
    sums: dict[str, float] = {}
    for row in rows:
        sums[row.label] = sums.get(row.label, 0.0) + row.weight
    return sums


def balanced(rows: Sequence[Row], how: Literal["none", "sqrt", "equal"]) -> list[Row]:
    """The rows with weights by which each label as a whole counts n^(1 - power) instead of its n; the total stays.

    `equal`: every label counts the same. `sqrt`: half-way. No label's rows are raised by more than `MOST_WEIGHT`
    against the commonest's.
    """
    sums = {label: n for label, n in weight_by_label(rows).items() if n > 0}
    if how == "none" or not sums:
        return list(rows)
    largest = max(sums.values())
    factors = {label: min((largest / n) ** _POWERS[how], MOST_WEIGHT) for label, n in sums.items()}
    scale = sum(sums.values()) / sum(n * factors[label] for label, n in sums.items())
    return [msgspec.structs.replace(row, weight=row.weight * factors.get(row.label, 1.0) * scale) for row in rows]


def prior_shift(natural: Mapping[str, float], learned: Mapping[str, float]) -> dict[str, float]:
    """What to add to each label's logit, so that a model taught with shares `learned` speaks of the shares `natural`.

    With p(y|x) taught under priors q, the posterior under priors p is proportional to p(y|x) p(y) / q(y) (Saerens,
    Latinne and Decaestecker 2002, "Adjusting the outputs of a classifier to new a priori probabilities", Neural
    Computation 14(1), eq. 2.4; King and Zeng 2001, "Logistic regression in rare events data", Political Analysis 9(2)
    call it prior correction). Both are given as weights, and need not sum to 1; a label with none is left alone.
    """
    of_natural, of_learned = sum(natural.values()), sum(learned.values())
    return {
        label: math.log(share / of_natural) - math.log(learned[label] / of_learned)
        for label, share in natural.items()
        if share > 0 and learned.get(label, 0.0) > 0
    }


def shift_of(contract: Contract, natural: Mapping[str, float], learned: Sequence[Row]) -> dict[str, float]:
    """`prior_shift` where the contract makes the shares unlike the natural ones; empty otherwise."""
    training = contract.training
    if training.balance == "none" and training.replay_by != "label":
        return {}
    return prior_shift(natural, weight_by_label(learned))
