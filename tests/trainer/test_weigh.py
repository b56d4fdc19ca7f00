"""Weights: duplicates keep what they count, balance is taken back by the prior, arrival is weighed without bias."""

from __future__ import annotations

import csv
import math
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.calibrator import uncurved
from accrual.encoder import Encoder, base_folder
from accrual.training_policy import Control, Lora, Training
from trainer.cohort import arrival_weights
from trainer.finetune import fine_tune
from trainer.weigh import MOST_WEIGHT, Row, balanced, control_weight, prior_shift, weight_by_label, without_duplicates

BANKING = Path(__file__).parents[2] / "examples" / "data" / "banking77" / "train.csv"
ROWS = st.lists(
    st.builds(
        Row,
        prediction_id=st.uuids().map(str),
        text=st.sampled_from("abc"),
        label=st.sampled_from(["good", "bad", "odd"]),
        weight=st.floats(0.1, 10),
    ),
    max_size=40,
)


@given(ROWS)
def test_one_of_each_text_and_label_is_left_the_newest_with_the_weight_of_all(rows: list[Row]) -> None:
    kept, others = without_duplicates(rows)
    keys = [(row.text, row.label) for row in kept]
    assert len(keys) == len(set(keys))
    assert {row.prediction_id for row in (*kept, *others)} == {row.prediction_id for row in rows}
    assert all(row.weight == 0 for row in others)
    for row in kept:
        like = [other for other in rows if (other.text, other.label) == (row.text, row.label)]
        assert row.prediction_id == like[-1].prediction_id
        assert row.weight == pytest.approx(sum(other.weight for other in like))
    assert weight_by_label(kept) == pytest.approx(weight_by_label(rows))


@given(ROWS.filter(bool), st.sampled_from(["none", "sqrt", "equal"]))
def test_balance_keeps_the_total_and_the_order_of_labels(rows: list[Row], how: str) -> None:
    before, after = weight_by_label(rows), weight_by_label(balanced(rows, how))  # type: ignore[arg-type]
    assert sum(after.values()) == pytest.approx(sum(before.values()))
    if how == "equal" and max(before.values()) / min(before.values()) <= MOST_WEIGHT:
        assert max(after.values()) == pytest.approx(min(after.values()))
    if how == "none":
        assert after == pytest.approx(before)
    for one, other in product(before, before):
        if before[one] > before[other]:
            assert after[one] >= after[other] * (1 - 1e-9)


SHARES = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@given(natural=SHARES, learned=SHARES, likelihood=st.lists(SHARES, min_size=1, max_size=4))
def test_the_shift_turns_posteriors_under_one_prior_into_those_under_another(
    natural: list[float], learned: list[float], likelihood: list[list[float]]
) -> None:
    """By Bayes: p(y|x) is proportional to p(x|y) p(y), whatever the shares."""
    labels = ["a", "b", "c"]
    p, q = np.array(natural) / sum(natural), np.array(learned) / sum(learned)
    shift = prior_shift(dict(zip(labels, natural, strict=True)), dict(zip(labels, learned, strict=True)))
    for given_y in likelihood:
        taught = np.log(np.array(given_y) * q)
        shifted = np.exp(taught + [shift[label] for label in labels])
        right = np.array(given_y) * p
        assert shifted / shifted.sum() == pytest.approx(right / right.sum())


def test_a_label_that_was_not_taught_is_left_alone() -> None:
    assert prior_shift({"a": 1.0, "b": 1.0}, {"a": 2.0}).keys() == {"a"}


@given(ages=st.lists(st.integers(0, 30), min_size=1, max_size=30), delays=st.lists(st.integers(0, 30), max_size=12))
def test_labels_that_came_stand_for_all_of_their_delay(ages: list[int], delays: list[int]) -> None:
    """If age and delay are independent, each delay's weight is what it would be had all labels come."""
    share = {delay: sum(age >= delay for age in ages) / len(ages) for delay in delays}
    reachable = [delay for delay in delays if share[delay] >= 1 / MOST_WEIGHT]
    come = [delay for age, delay in product(ages, reachable) if delay <= age]
    weights = arrival_weights(np.array(come, dtype=np.int64), np.array(ages, dtype=np.int64))
    total = Counter()
    for delay, weight in zip(come, weights, strict=True):
        total[delay] += weight
    wanted = Counter(reachable)
    for delay in total:
        assert total[delay] / len(come) == pytest.approx(wanted[delay] / len(reachable))


def test_no_row_counts_more_than_the_most() -> None:
    ages = np.arange(1000, dtype=np.int64)
    weights = arrival_weights(np.array([0, 500, 999, 5000], dtype=np.int64), ages)
    assert weights[2] == weights[3] == pytest.approx(MOST_WEIGHT * weights[0])
    assert weights[1] == pytest.approx(2 * weights[0])
    assert len(arrival_weights(np.zeros(0, dtype=np.int64), ages)) == 0


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        ({"out": True}, 1.0),
        ({"out": True, "chance": 0.25}, 4.0),
        ({"out": True, "chance": 0.0001}, MOST_WEIGHT),
        ({"out": True, "chance": -1.0}, MOST_WEIGHT),
        ({"out": True, "chance": 7.0}, 1.0),
        ({"out": True, "done": True}, 1.0),
        ({"out": False, "done": True}, 0.2),
        ({"out": None, "done": None}, 1.0),
    ],
)
def test_a_row_counts_by_whether_the_model_shaped_it(inputs: dict[str, object], weight: float) -> None:
    control = Control(exposure="done", holdout="out", propensity="chance", weight=0.2)
    assert control_weight(control, inputs) == pytest.approx(weight)
    assert control_weight(None, inputs) == 1.0


def test_without_exposure_all_that_is_not_held_out_is_exposed() -> None:
    control = Control(holdout="out", weight=0.2)
    assert control_weight(control, {"out": False}) == 0.2
    assert control_weight(control, {}) == 0.2
    assert math.isclose(control_weight(control, {"out": True}), 1.0)


def test_a_balanced_model_still_says_how_rare_the_rare_is() -> None:
    """One in ten is rare, whatever the text; taught as if half were, it says about half, and with the shift a tenth."""
    with BANKING.open(encoding="utf-8", newline="") as file:
        texts = [line["text"] for line in csv.DictReader(file) if line["category"] == "card_arrival"][:150]
    rows = [Row(str(n), text, "rare" if n % 10 == 0 else "common") for n, text in enumerate(texts[:100])]
    learn = balanced(rows, "equal")
    training = Training(template="{text}", epochs=1, max_tokens=32, lora=Lora(rank=2, alpha=4, layers=1))
    tuned = fine_tune(
        Encoder.load(base_folder("minilm"), 32),
        [row.text for row in learn],
        [row.label for row in learn],
        ["common", "rare"],
        training,
        seed=1,
        weights=[row.weight for row in learn],
    )
    shift = prior_shift(weight_by_label(rows), weight_by_label(learn))
    logits = tuned.logits(texts[100:])
    without = uncurved(logits, 1.0, each=False)[:, 1].mean()
    shifted = uncurved(logits + np.array([shift["common"], shift["rare"]]), 1.0, each=False)[:, 1].mean()
    assert without > 0.3
    assert 0.05 < shifted < 0.2
