"""The events of a benchmark: the same bytes for every contender, made and produced as fast as Python can.

The n-th prediction has the id `n`, so that what came out can be checked without remembering what went
in. Its outcome comes `delay` ids after, in event time too; a millisecond of it passes from id to id. Of the ids, 1%
come twice on both sides. Of 5% the prediction is held up on its way, and comes after the outcome.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from accrual.config import Config
from accrual.kafka import TopicNames, producer

LABELS = ("card_arrival", "card_linking", "exchange_rate", "pin_blocked", "atm_support", "top_up_limits", "age_limit")
STEP = 1_000  # ids, and milliseconds of event time
REPEAT_AFTER = 2 * STEP
HELD_UP_BY = 10 * STEP  # ids after the outcome
DELAY = 10 * STEP
# Yesterday: a broker that keeps topics by the time in their records would delete older ones while they are read.
START = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)

_PREDICTION = (
    b'{"prediction_id":"%%016x","stream":"support-intents","model":"router@7","predicted_at":"%s.%%03dZ",'
    b'"inputs":{"text":"I ordered a card last week: where is it?"},'
    b'"output":{"label":"card_arrival","probabilities":{"card_arrival":0.8,"age_limit":0.2}}}'
)
_OUTCOME = b'{"prediction_id":"%%016x","stream":"support-intents","observed_at":"%s.%%03dZ","values":{"intent":"%%s"}}'
_LABELS = [label.encode() for label in LABELS]

Record = dict[str, bytes]


@dataclass(frozen=True)
class Load:
    """Predictions with the ids below `predicted`; an outcome for those below `answered`, `delay` ids after.

    All three are multiples of `STEP`. It is produced in `steps` steps, each what happens in a second of event time.
    """

    predicted: int
    answered: int
    delay: int = DELAY

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return (self.predicted + self.delay + HELD_UP_BY) // STEP

    def step(self, number: int) -> tuple[list[Record], list[Record]]:
        """The predictions and the outcomes of one step, in order."""
        again, answered = number - REPEAT_AFTER // STEP, number - self.delay // STEP
        held_up = answered - HELD_UP_BY // STEP
        answered_again = answered - REPEAT_AFTER // STEP
        predictions = self._predictions(number, [n for n in _ids(number) if not is_held_up(n)])
        predictions += self._predictions(again, [n for n in _ids(again) if is_repeated(n)])
        predictions += self._predictions(held_up, [n for n in _ids(held_up) if is_held_up(n)])
        outcomes = self._outcomes(answered, _ids(answered))
        outcomes += self._outcomes(answered_again, [n for n in _ids(answered_again) if is_repeated(n)])
        return predictions, outcomes

    def _predictions(self, step: int, ids: Iterable[int]) -> list[Record]:
        if not 0 <= step < self.predicted // STEP:
            return []
        form = _PREDICTION % _second(step)
        return [{"key": b"%016x" % n, "value": form % (n, n % STEP)} for n in ids]

    def _outcomes(self, step: int, ids: Iterable[int]) -> list[Record]:
        if not 0 <= step < self.answered // STEP:
            return []
        form = _OUTCOME % _second(step + self.delay // STEP)
        return [{"key": b"%016x" % n, "value": form % (n, n % STEP, _LABELS[n % len(_LABELS)])} for n in ids]


@dataclass(frozen=True)
class Produced:
    """What was produced: events, and the mean size of each side's values in bytes."""

    events: int
    prediction_bytes: float
    outcome_bytes: float


def is_repeated(n: int) -> bool:
    """Whether prediction and outcome of this id come twice: 1% do."""
    return n % 100 == 0


def is_held_up(n: int) -> bool:
    """Whether the prediction of this id comes after its outcome: 5% do."""
    return n % 20 == 7


def expected_label(n: int) -> str:
    """The label of this id's ground truth."""
    return LABELS[n % len(LABELS)]


def produce(config: Config, load: Load, steps: range, rate: float | None = None, title: str = "producing") -> Produced:
    """Produce these steps of a load into the input topics, at `rate` events a second (None: as fast as it goes)."""
    names = TopicNames(config.topics.prefix)
    properties = {
        "queue.buffering.max.messages": 500_000,
        "compression.type": "lz4",
        "batch.size": 1 << 20,
        "linger.ms": 5 if rate else 50,
        "log_level": 3,
    }
    client = producer(config, **properties)
    events, sizes, counts = 0, [0, 0], [0, 0]
    started = time.perf_counter()
    with _progress() as progress:
        for number in progress.track(steps, description=f"{title:32}"):
            for side, (topic, records) in enumerate(
                zip((names.predictions, names.outcomes), load.step(number), strict=True)
            ):
                counts[side] += len(records)
                sizes[side] += sum(len(record["value"]) for record in records)
                for part in _parts(records, 100 if rate else STEP):
                    events += len(part)
                    while part := part[client.produce_batch(topic, part) :]:
                        client.poll(0.05)  # the queue is full
                    client.poll(0)
                    if rate and (ahead := events / rate - (time.perf_counter() - started)) > 0:
                        time.sleep(ahead)
        if left := client.flush(120):
            raise SystemExit(f"{left} events could not be produced within 120 s")
    return Produced(events, sizes[0] / max(counts[0], 1), sizes[1] / max(counts[1], 1))


def _ids(step: int) -> range:
    return range(step * STEP, (step + 1) * STEP)


def _second(step: int) -> bytes:
    return (START + timedelta(milliseconds=step * STEP)).strftime("%Y-%m-%dT%H:%M:%S").encode()


def _parts(records: list[Record], size: int) -> Iterator[list[Record]]:
    for first in range(0, len(records), size):
        yield records[first : first + size]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn()
    )
