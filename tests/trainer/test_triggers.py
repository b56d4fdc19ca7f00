"""Triggers: each sets a run off at its bound and not before, and what holds a run back never does so for ever."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.training_policy import Decline, Drift, Triggers
from trainer.triggers import IMAGINED_GAIN, Before, Facts, decide

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
NOTHING = Facts(rows=0, passed=timedelta(0))


def test_without_triggers_every_new_window_sets_a_run_off() -> None:
    assert decide(Triggers(), NOTHING, [], NOW).reason == "a new sealed window"
    assert decide(Triggers(), NOTHING, [], NOW).train


@pytest.mark.parametrize(
    ("triggers", "short", "enough", "words"),
    [
        (Triggers(rows=2000), Facts(1999, DAY), Facts(2000, DAY), "rows: 2,000 of 2,000"),
        (Triggers(every="7d"), Facts(0, 6.9 * DAY), Facts(0, 7 * DAY), "time: 7d of 7d"),
        (
            Triggers(drift=Drift(most=0.25)),
            Facts(9, DAY, drift=0.249, drift_of="label"),
            Facts(9, DAY, drift=0.25, drift_of="label"),
            "drift: psi of label 0.25, of 0.25",
        ),
        (
            Triggers(decline=Decline(brier=0.02)),
            Facts(9, DAY, brier_rise=0.019, ece_rise=0.9),
            Facts(9, DAY, brier_rise=0.02),
            "decline: Brier +0.0200, of +0.02",
        ),
        (
            Triggers(decline=Decline(ece=0.02)),
            Facts(9, DAY),
            Facts(9, DAY, ece_rise=0.03),
            "decline: ECE +0.0300, of +0.02",
        ),
        (Triggers(recalled=5), Facts(9, DAY, recalled=4), Facts(9, DAY, recalled=5), "recall: 5 rows of 5"),
    ],
)
def test_each_sets_a_run_off_at_its_bound(triggers: Triggers, short: Facts, enough: Facts, words: str) -> None:
    assert not decide(triggers, short, [], NOW).train
    assert decide(triggers, short, [], NOW).reason.startswith("not yet: ")
    decision = decide(triggers, enough, [], NOW)
    assert (decision.train, decision.reason) == (True, words)


def test_any_of_several_is_enough_and_all_that_are_reached_are_said() -> None:
    triggers = Triggers(rows=100, every="7d", recalled=1)
    decision = decide(triggers, Facts(150, DAY, recalled=3), [], NOW)
    assert decision.train
    assert decision.reason == "rows: 150 of 100; recall: 3 rows of 1"


@pytest.mark.parametrize("ago", [timedelta(0), timedelta(hours=23, minutes=59)])
def test_a_cooldown_holds_back_and_ends(ago: timedelta) -> None:
    triggers = Triggers(cooldown="1d")
    held = decide(triggers, NOTHING, [Before(NOW - ago, 60.0)], NOW)
    assert not held.train
    assert "held back (a new sealed window): cooldown: " in held.reason
    assert decide(triggers, NOTHING, [Before(NOW - DAY, 60.0)], NOW).train


def test_a_budget_holds_back_and_ends() -> None:
    triggers = Triggers(runs_per_day=2)
    before = [Before(NOW - 1.5 * DAY, 9.0), Before(NOW - 0.5 * DAY, 9.0), Before(NOW - 0.4 * DAY, 9.0)]
    assert not decide(triggers, NOTHING, before, NOW).train
    assert decide(triggers, NOTHING, before, NOW + 0.5 * DAY).train


@given(st.lists(st.timedeltas(-800 * DAY, 800 * DAY), max_size=8), st.timedeltas(-800 * DAY, 800 * DAY))
def test_whatever_the_clock_did_a_run_comes_within_days(said: list[timedelta], back: timedelta) -> None:
    """A run that was said by a clock that was ahead holds back once that time comes: for its one day, not for ever."""
    triggers = Triggers(cooldown="12h", runs_per_day=1)
    before = [Before(NOW + ahead, 60.0) for ahead in said]
    hours = [NOW + back + timedelta(hours=n) for n in range(24 * (len(said) + 1) + 1)]
    assert any(decide(triggers, NOTHING, before, hour).train for hour in hours)


def test_a_clock_that_was_set_back_holds_nothing_back() -> None:
    ahead = [Before(NOW + 365 * DAY, 60.0)]
    assert decide(Triggers(cooldown="1d", runs_per_day=1), NOTHING, ahead, NOW).train


def test_a_run_that_is_not_expected_to_be_worth_its_time_waits_for_more_rows() -> None:
    triggers = Triggers(least_gain=0.1)
    before = [Before(NOW - DAY, 50.0, gain=0.009)]
    gain = (0.009 + IMAGINED_GAIN) / 2
    assert gain * 900 < 0.1 * 50 < gain * 1001
    held = decide(triggers, Facts(900, DAY), before, NOW)
    assert not held.train
    assert "cost: Brier 4.5 expected to be saved, 5 needed" in held.reason
    assert decide(triggers, Facts(1001, DAY), before, NOW).train
    assert decide(triggers, Facts(1, DAY), [Before(NOW - DAY, 50.0)], NOW).train, "nothing is known yet"


def test_losing_again_and_again_does_not_end_training_for_ever() -> None:
    losses = [Before(NOW - DAY, 50.0, gain=0.0)] * 5
    assert not decide(Triggers(least_gain=0.1), Facts(1000, DAY), losses, NOW).train
    assert decide(Triggers(least_gain=0.1), Facts(40_000, DAY), losses, NOW).train
