"""The gate: its evidence is what it says, chance does not get past it, and a real gain does."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.contract import Gate
from trainer.gate import judge, spent_alpha, wealth

GATE = Gate(alpha=0.05, patience=3, max_ece_increase=0.05)
gains = st.lists(st.floats(-2, 2), max_size=60).map(np.array)


@given(gains, gains)
def test_evidence_never_negative_and_does_not_depend_on_when_one_looks(first: np.ndarray, second: np.ndarray) -> None:
    both = np.concatenate([first, second])
    assert wealth(both) >= 0
    looked = judge([first, second], 1, 0.0, GATE).e_value if len(both) else 1.0
    assert looked == pytest.approx(wealth(both))


@given(st.floats(0.01, 2))
def test_a_fair_bet_is_fair(size: float) -> None:
    """Gain and loss of one size, equally likely: the mean of what a stake becomes is what it was."""
    assert (wealth(np.array([size])) + wealth(np.array([-size]))) / 2 == pytest.approx(1.0)


def test_what_is_no_difference_of_brier_scores_is_refused() -> None:
    for wrong in (2.1, -2.1, math.nan):
        with pytest.raises(ValueError, match=r"\[-2, 2\]"):
            wealth(np.array([0.0, wrong]))


def test_no_evidence_without_rows_or_without_difference() -> None:
    assert wealth(np.array([])) == 1.0
    assert wealth(np.zeros(1000)) == pytest.approx(1.0)


def test_alpha_is_spent_once_over_all_challengers() -> None:
    assert sum(spent_alpha(0.05, nth) for nth in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_chance_is_published_at_most_as_often_as_alpha_says() -> None:
    """A/A: challenger and champion equally good; looked at after every hundred rows, for ever after."""
    rng = np.random.default_rng(5)
    runs, published = 1000, 0
    gate = Gate(alpha=0.2, patience=100)
    for _ in range(runs):
        windows = np.split(rng.choice([-0.4, -0.1, 0.1, 0.4], size=1000), 10)
        nth_alpha = 1 / spent_alpha(gate.alpha, 1)
        evidence = [wealth(np.concatenate(windows[: n + 1])) for n in range(len(windows))]
        published += max(evidence) >= nth_alpha
    allowed = spent_alpha(gate.alpha, 1)
    assert published / runs <= allowed + 3 * math.sqrt(allowed / runs)


def test_a_real_gain_is_promoted_and_a_loss_rejected() -> None:
    rng = np.random.default_rng(7)
    better = rng.normal(0.15, 0.4, 600).clip(-2, 2)
    assert judge([better], 1, 0.0, GATE).verdict == "promote"
    assert judge([-better], 1, 0.0, GATE).verdict == "reject"


def test_a_small_gain_waits_for_more_rows_until_patience_ends() -> None:
    rng = np.random.default_rng(9)
    windows = [rng.normal(0.002, 0.3, 300) for _ in range(3)]
    assert judge(windows[:1], 1, 0.0, GATE).verdict == "wait"
    assert judge(windows[:2], 1, 0.0, GATE).verdict == "wait"
    last = judge(windows, 1, 0.0, GATE)
    assert last.verdict == "reject"
    assert "patience" in last.reason


def test_better_but_worse_calibrated_is_not_published() -> None:
    better = np.full(600, 0.2)
    assert judge([better], 1, 0.049, GATE).verdict == "promote"
    refused = judge([better], 1, 0.051, GATE)
    assert refused.verdict == "reject"
    assert "calibration" in refused.reason


def test_later_challengers_need_more_evidence() -> None:
    rows = np.full(60, 0.2)
    assert judge([rows], 1, 0.0, GATE).verdict == "promote"
    assert judge([rows], 40, 0.0, GATE).verdict == "wait"
