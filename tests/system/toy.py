"""A small stream with everything that happens to real ones, and what its ground truth must be in the end.

What is expected is worked out here from the events alone, prediction by prediction, without any of the join's code.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from accrual import Distribution, Recorder

CONTRACT = """
stream: toy
inputs:
  text: {type: string}
output:
  classes: [bad, good]
  prior: {bad: 0.5, good: 0.5}
outcome:
  values:
    verdict: {type: string}
label:
  field: verdict
horizon: 1d
on_expiry: bad
late: dead_letter
disorder: 1h
training:
  template: "{text}"
  window_rows: 100
  epochs: 1
  max_tokens: 16
  lora: {rank: 2, alpha: 4, layers: 1}
"""
HORIZON = timedelta(days=1)
_SAID = Distribution(label="good", probabilities={"bad": 0.5, "good": 0.5})
_START = datetime(2026, 2, 1, tzinfo=UTC)


class Expected(msgspec.Struct):
    """Final rows as id -> (status, label, revision), and dead letters as (reason, id) -> how many."""

    rows: dict[str, tuple[str, str | None, int]] = {}
    dead_letters: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)


class Sending(msgspec.Struct):
    """One event on its way: when it is sent, on the clock of event time."""

    at: datetime
    kind: str
    prediction_id: str
    moment: datetime
    content: dict[str, Any]


def events(predictions: int, seed: int) -> tuple[list[Sending], list[Sending], Expected]:
    """All events in sending order; those that then carry event time past every horizon; what must come out."""
    rng = random.Random(seed)
    sendings: list[Sending] = []
    expected = Expected()

    def send(kind: str, prediction_id: str, moment: datetime, content: dict[str, Any]) -> None:
        # Up to half an hour late: outcomes overtake predictions, within the contract's disorder.
        sendings.append(Sending(moment + timedelta(minutes=rng.uniform(0, 30)), kind, prediction_id, moment, content))

    for n in range(predictions):
        prediction_id = f"p{n}"
        asked_at = _START + timedelta(minutes=15 * n)
        verdict = rng.choice(["bad", "good"])
        for _ in range(2 if rng.random() < 0.1 else 1):
            send("prediction", prediction_id, asked_at, {"text": f"this one is {verdict}, said number {n}"})
        outcomes = list(_outcomes(rng, asked_at, verdict))
        for observed_at, said in outcomes:
            send("outcome", prediction_id, observed_at, {"verdict": said})
        distinct = sorted(set(outcomes))
        counting = [outcome for outcome in distinct if outcome[0] <= asked_at + HORIZON]
        expected.rows[prediction_id] = (
            ("labeled", counting[-1][1], len(counting)) if counting else ("expired", "bad", 0)
        )
        expected.dead_letters.update({("late", prediction_id): len(distinct) - len(counting)})
    for n in range(predictions // 20):
        send("outcome", f"o{n}", _START + timedelta(minutes=15 * rng.uniform(0, predictions)), {"verdict": "good"})
        expected.dead_letters["orphan", f"o{n}"] = 1
    expected.dead_letters = +expected.dead_letters
    sendings.sort(key=lambda sending: sending.at)
    return sendings, list(_tides(sendings[-1].at + timedelta(days=10), expected)), expected


def _outcomes(rng: random.Random, asked_at: datetime, verdict: str) -> Iterable[tuple[datetime, str]]:
    first = (asked_at + timedelta(minutes=rng.expovariate(1 / 120)), verdict)
    chance = rng.random()
    if chance < 0.7:
        return [first]
    if chance < 0.8:  # corrected
        return [first, (first[0] + timedelta(hours=rng.uniform(0, 2)), "good" if verdict == "bad" else "bad")]
    if chance < 0.85:  # sent twice
        return [first, first]
    if chance < 0.9:  # after the horizon
        return [(asked_at + HORIZON + timedelta(hours=rng.uniform(1, 24)), verdict)]
    return []


def _tides(moment: datetime, expected: Expected) -> Iterable[Sending]:
    """Predictions with prompt outcomes, enough that every partition of both topics gets some."""
    for n in range(64):
        expected.rows[f"t{n}"] = ("labeled", "good", 1)
        yield Sending(moment, "prediction", f"t{n}", moment, {"text": "tide"})
        yield Sending(moment, "outcome", f"t{n}", moment + timedelta(minutes=1), {"verdict": "good"})


def emit(recorder: Recorder, sendings: list[Sending], seconds: float, meanwhile: Callable[[float], None]) -> None:
    """Send all, evenly over `seconds`; `meanwhile` is called often with the share that is sent."""
    step = max(1, len(sendings) // 200)
    for start in range(0, len(sendings), step):
        for sending in sendings[start : start + step]:
            if sending.kind == "prediction":
                recorder.predict(
                    sending.content,
                    _SAID,
                    model="toy@0",
                    prediction_id=sending.prediction_id,
                    predicted_at=sending.moment,
                )
            else:
                recorder.outcome(sending.prediction_id, sending.content, observed_at=sending.moment)
        meanwhile(seconds * step / len(sendings))
    recorder.flush(30)
