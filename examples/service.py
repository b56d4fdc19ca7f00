"""A production service, replayed: `python -m examples.service --stream support-intents --minutes 4`.

It knows two things of Accrual: the ModelFeed that hands it the champion, and the Recorder it tells what the champion
said and what happened. Its days are those of the data, compressed: events are sent in the order of event time, and each
prediction and each moment at which a label is settled (its outcome, or the horizon) takes the same share of the replay
time, so that quiet years pass quickly. A champion that is published meanwhile serves the next batch.

Progress goes to stdout, a JSON object a line.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from accrual import ModelFeed, Recorder, load_config, new_prediction_id
from accrual.cli import run
from accrual.contract import load_contracts
from accrual.errors import ConfigError
from examples import (
    argument_ranking,
    assistant_intents,
    comment_emotions,
    credit_risk,
    restaurant_texts,
    support_intents,
    text_similarity,
    venue_choices,
    venue_replies,
)
from examples.case import Case

STREAMS = {
    "support-intents": support_intents,
    "assistant-intents": assistant_intents,
    "credit-risk": credit_risk,
    "comment-emotions": comment_emotions,
    "text-similarity": text_similarity,
    "argument-ranking": argument_ranking,
    "restaurant-texts": restaurant_texts,
    "venue-replies": venue_replies,
    "venue-choices": venue_choices,
}

_BATCH = 64
_FIRST_CHAMPION_S = 180.0


class Progress(msgspec.Struct, frozen=True):
    """How far the replay is. `event_time` is the data's; `lost` counts events the recorder could not deliver."""

    predictions: int
    outcomes: int
    total: int
    model: str
    event_time: datetime
    lost: int


class _Occurrence(msgspec.Struct, frozen=True):
    """One event of the stream: the prediction of a case, or (with `values`) an outcome of it."""

    at: datetime
    case: int
    values: dict[str, Any] | None = None


def replay(cases: Sequence[Case], horizon: timedelta, feed: ModelFeed, recorder: Recorder, seconds: float) -> None:
    """Serve all cases within about `seconds`: later if predicting takes longer, never faster than the pace."""
    occurrences, pace = _in_order(cases), _pace(cases, horizon)
    moments = [event.at for event in occurrences]
    ids = [new_prediction_id() for _ in cases]
    predictions = outcomes = done = 0
    champion = feed.champion(_FIRST_CHAMPION_S)
    start = said = time.monotonic()
    while done < len(occurrences):
        now = time.monotonic()
        passed = int(len(pace) * (now - start) / seconds)
        due = bisect_left(moments, pace[passed]) if passed < len(pace) else len(moments)
        due = min(due, done + _BATCH)
        if due == done:
            time.sleep(0.05)
            continue
        batch = occurrences[done:due]
        champion = feed.champion()
        asked = [cases[event.case].inputs for event in batch if event.values is None]
        answers = iter(champion.predict(asked) if asked else [])
        for event in batch:
            if event.values is None:
                recorder.predict(
                    cases[event.case].inputs,
                    next(answers),
                    model=champion.model,
                    prediction_id=ids[event.case],
                    predicted_at=event.at,
                )
                predictions += 1
            else:
                recorder.outcome(ids[event.case], event.values, observed_at=event.at)
                outcomes += 1
        done = due
        if now - said > 0.5 or done == len(occurrences):
            said = now
            lost = recorder.failed + recorder.dropped
            _say(Progress(predictions, outcomes, len(occurrences), champion.model, batch[-1].at, lost))


def _in_order(cases: Sequence[Case]) -> list[_Occurrence]:
    """All events by event time; a prediction before an outcome of the same moment."""
    asked = [_Occurrence(case.predicted_at, n) for n, case in enumerate(cases)]
    known = [_Occurrence(at, n, values) for n, case in enumerate(cases) for at, values in case.outcomes]
    return sorted(asked + known, key=lambda event: event.at)


def _pace(cases: Sequence[Case], horizon: timedelta) -> list[datetime]:
    """The moments of event time that are passed at an even pace."""
    settled = [min([case.predicted_at + horizon, *(at for at, _ in case.outcomes)]) for case in cases]
    return sorted([*(case.predicted_at for case in cases), *settled])


def _say(progress: Progress) -> None:
    print(msgspec.json.encode(progress).decode(), flush=True)


def main(
    stream: Annotated[str, typer.Option(help=f"one of {', '.join(STREAMS)}")] = "support-intents",
    minutes: Annotated[float, typer.Option(help="how long the replay takes")] = 4.0,
    rows: Annotated[int, typer.Option(help="how many cases; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="seed of everything drawn")] = 7,
) -> None:
    """Replay a stream's cases to the configured broker, predicting with the current champion."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = load_config()
    contract = load_contracts(Path(config.contracts)).get(stream)
    source = STREAMS.get(stream)
    if contract is None or source is None:
        raise ConfigError(f"--stream {stream}: there is data for {', '.join(STREAMS)}, with a contract for each")
    cases = source.cases(contract, rows or source.ROWS, seed)
    with Recorder(stream, config) as recorder, ModelFeed(stream, config) as feed:
        replay(cases, timedelta(microseconds=contract.horizon_us), feed, recorder, minutes * 60)
        recorder.flush(60)
        if lost := recorder.buffered + recorder.failed + recorder.dropped:
            raise SystemExit(f"{lost} events were not delivered")


if __name__ == "__main__":
    run(lambda: typer.run(main))
