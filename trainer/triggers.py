"""Triggers: is it time for a run? Pure: facts and the clock in, a decision with its reason out.

    what sets a run off   any of rows, every, drift, decline, recalled; where the contract names none, a new window
    what holds it back    cooldown, runs_per_day, least_gain

A run needs a sealed window that none was given before: only that holds rows, and a snapshot that shows revisions and
erasures. So a trigger brings a run forward to the next sealed window, never before it. A person may ask at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from accrual.contract import parse_duration
from accrual.training_policy import Triggers

LOOKED_BACK = 5  # judged challengers
IMAGINED_GAIN = 0.001  # Brier score a row, of one more challenger: so that no run of losses ends training for ever
_DAY = timedelta(days=1)


class Facts(msgspec.Struct, frozen=True):
    """What is known of a stream since the last run.

    `rows` there are to learn from in windows that no run was given; `passed`: event time from the last run's newest
    window to the newest one. `drift`: the largest of the metric that the contract names, and of what. `brier_rise` and
    `ece_rise`: how much worse the champion is on the newest window than it was when it was promoted, None where that is
    not known. `recalled`: rows of the windows that it learned from, relabeled, erased or put in quarantine since.
    """

    rows: int
    passed: timedelta
    drift: float = 0.0
    drift_of: str = ""
    brier_rise: float | None = None
    ece_rise: float | None = None
    recalled: int = 0


class Before(msgspec.Struct, frozen=True):
    """A run of before: when it was said first, by the clock; how long it took; what it gained.

    `gain`: by how much its model lowered the Brier score of a row; 0 if that is not published, None while it is open.
    """

    at: datetime
    seconds: float
    gain: float | None = None


class Decision(msgspec.Struct, frozen=True):
    """`reason` is for a person: what set the run off, or what it waits for."""

    train: bool
    reason: str


def decide(triggers: Triggers, facts: Facts, before: Sequence[Before], now: datetime) -> Decision:
    """Whether to train now, on at least one new window. `before`: all runs of the stream, in order."""
    looked_at = _looked_at(triggers, facts)
    reasons = [reason for reached, reason in looked_at if reached] or ([] if looked_at else ["a new sealed window"])
    if not reasons:
        return Decision(False, "not yet: " + "; ".join(reason for _, reason in looked_at))
    held = [held for held in (_cooldown(triggers, before, now), _budget(triggers, before, now)) if held]
    held += [held for held in [_cost(triggers, facts, before)] if held]
    if held:
        return Decision(False, f"held back ({'; '.join(reasons)}): {'; '.join(held)}")
    return Decision(True, "; ".join(reasons))


def _looked_at(triggers: Triggers, facts: Facts) -> list[tuple[bool, str]]:
    """Each trigger of the contract: whether it is reached, and how far it is."""
    found: list[tuple[bool, str]] = []
    if triggers.rows is not None:
        found.append((facts.rows >= triggers.rows, f"rows: {facts.rows:,} of {triggers.rows:,}"))
    if triggers.every is not None:
        every = parse_duration(triggers.every)
        found.append((facts.passed >= every, f"time: {_words(facts.passed)} of {_words(every)}"))
    if triggers.drift is not None:
        drift = triggers.drift
        of = f" of {facts.drift_of}" if facts.drift_of else ""
        reached = facts.drift >= drift.most
        found.append((reached, f"drift: {drift.metric}{of} {facts.drift:.3g}, of {drift.most:g}"))
    if triggers.decline is not None:
        for name, rise, most in (
            ("Brier", facts.brier_rise, triggers.decline.brier),
            ("ECE", facts.ece_rise, triggers.decline.ece),
        ):
            if most is not None:
                said = "not known" if rise is None else f"{rise:+.4f}"
                found.append((rise is not None and rise >= most, f"decline: {name} {said}, of {most:+g}"))
    if triggers.recalled is not None:
        reached = facts.recalled >= triggers.recalled
        found.append((reached, f"recall: {facts.recalled:,} rows of {triggers.recalled:,}"))
    return found


def _cooldown(triggers: Triggers, before: Sequence[Before], now: datetime) -> str | None:
    """A last run that is later than now was said by a clock that was ahead: then nothing is known, and nothing held."""
    if triggers.cooldown is None or not before:
        return None
    passed, wanted = now - before[-1].at, parse_duration(triggers.cooldown)
    return f"cooldown: {_words(passed)} of {_words(wanted)}" if timedelta(0) <= passed < wanted else None


def _budget(triggers: Triggers, before: Sequence[Before], now: datetime) -> str | None:
    if triggers.runs_per_day is None:
        return None
    spent = sum(timedelta(0) <= now - run.at < _DAY for run in before)
    return f"budget: {spent} runs in a day of {triggers.runs_per_day}" if spent >= triggers.runs_per_day else None


def _cost(triggers: Triggers, facts: Facts, before: Sequence[Before]) -> str | None:
    """What a run is expected to save, against what it costs.

    Saved: the mean gain a row of the last challengers and of the imagined one, over as many rows as came since the last
    run, since about as many will come until the next. Cost: the seconds of the last run. It says nothing before a
    challenger was judged.
    """
    gains = [run.gain for run in before if run.gain is not None][-LOOKED_BACK:]
    if triggers.least_gain is None or not gains:
        return None
    saved = (sum(gains) + IMAGINED_GAIN) / (len(gains) + 1) * facts.rows
    needed = triggers.least_gain * before[-1].seconds
    return f"cost: Brier {saved:.3g} expected to be saved, {needed:.3g} needed" if saved < needed else None


def _words(duration: timedelta) -> str:
    seconds = duration.total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g}{unit}"
    return f"{seconds:.3g}s"
