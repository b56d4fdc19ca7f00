"""The benchmark's events: valid, each id as often and in the order that the load promises."""

from __future__ import annotations

import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
from load import DELAY, HELD_UP_BY, START, STEP, Load, expected_label, is_held_up, is_repeated

from accrual.contract import load_contracts
from accrual.events import read_outcome, read_prediction

CONTRACTS = load_contracts(Path("schemas/contracts"))
NOW_MS = int(time.time() * 1000)


@pytest.mark.parametrize(
    "load",
    [
        Load(2 * DELAY, 2 * DELAY),
        Load(3 * DELAY, 2 * DELAY),
        Load(40 * STEP, 10 * STEP, 30 * STEP),
        Load(STEP, STEP),
        Load(5 * STEP, 0),
    ],
)
def test_each_id_comes_once_and_the_repeated_twice(load: Load) -> None:
    counts: tuple[Counter[int], Counter[int]] = Counter(), Counter()
    for number in range(load.steps):
        for side, records in enumerate(load.step(number)):
            counts[side].update(int(record["key"], 16) for record in records)
    assert counts[0] == {n: 1 + is_repeated(n) for n in range(load.predicted)}
    assert counts[1] == {n: 1 + is_repeated(n) for n in range(load.answered)}


def test_outcomes_come_after_the_delay_and_held_up_predictions_after_them() -> None:
    load = Load(60 * STEP, 40 * STEP, 20 * STEP)
    came: tuple[dict[int, int], dict[int, int]] = {}, {}
    for number in range(load.steps):
        for side, records in enumerate(load.step(number)):
            for record in records:
                came[side].setdefault(int(record["key"], 16), number)
    for n in range(load.answered):
        assert came[1][n] == n // STEP + 20
        assert came[0][n] == (came[1][n] + HELD_UP_BY // STEP if is_held_up(n) else n // STEP)
    assert sum(map(is_held_up, range(load.answered))) == load.answered * 0.05


def test_events_keep_the_contract_and_carry_the_expected_label() -> None:
    load = Load(50 * STEP, 50 * STEP, 30 * STEP)
    assert len(load.step(45)[0]) == 1010  # held up and repeated ones among them
    for number in (0, 30, 45):
        predictions, outcomes = load.step(number)
        for record in predictions[::97]:
            read_prediction(record["value"], record["key"], NOW_MS, CONTRACTS)
        for record in outcomes[::97]:
            event = read_outcome(record["value"], record["key"], NOW_MS, CONTRACTS)
            number = int(event.prediction_id, 16)
            values = CONTRACTS[event.stream].decode_values(event.values)
            assert CONTRACTS[event.stream].label_of(values) == expected_label(number)
            assert event.observed_at == START + timedelta(milliseconds=number) + timedelta(seconds=30)
