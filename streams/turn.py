"""What goes into one turn of a partition, and what comes of it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import msgspec

from accrual.contract import Contract
from accrual.events import DeadLetter, Outcome, Prediction, Tick
from accrual.kafka import TopicNames
from streams.join import Row, Step, ground_truth
from streams.state import Record, State, Timer

TIMERS_PER_TURN = 20_000


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A valid event with its place in its topic and its original bytes.

    `key` is its entry's (of a claim its entity's), `id_` the record's; `at` is the event's time in microseconds.
    """

    key: bytes
    id_: bytes
    offset: int
    event: Prediction | Outcome
    at: int
    record: bytes


@dataclass(slots=True)
class Arrivals:
    """The valid events of one batch and partition, of each topic in the order of their offsets; and the ticks.

    `claims` are outcomes that name an entity; `outcomes` those that name their prediction.
    """

    predictions: list[Arrival] = field(default_factory=list)
    outcomes: list[Arrival] = field(default_factory=list)
    claims: list[Arrival] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.predictions or self.outcomes or self.claims or self.ticks)


class Drained(msgspec.Struct, frozen=True):
    """Which of a partition's two topics have nothing more to read at the moment."""

    predictions: bool = False
    outcomes: bool = False


@dataclass(slots=True)
class Turn:
    """What one batch of partition `number` led to.

    `records` are for the changelog and the state; `rows` for ground truth, by the prediction's key; `strays` belong
    into another partition of their topic, by its number; `ticks` are to be written to this partition of the
    predictions; `counts`: what became of the events; `pending`: how many more predictions of a stream are pending, or
    fewer; `delays`: from prediction to outcome in microseconds, of those labeled for the first time. `soonest`,
    `timers` and `fired` are for the state: see `State.save`. `more_due`: more timers than one turn takes.
    """

    number: int
    topics: TopicNames
    records: list[Record] = field(default_factory=list)
    rows: list[tuple[bytes, bytes]] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    strays: list[tuple[int, Arrival]] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    pending: Counter[str] = field(default_factory=Counter)
    delays: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    soonest: dict[str, int] = field(default_factory=dict)
    timers: list[Timer] = field(default_factory=list)
    fired: list[bytes] = field(default_factory=list)
    more_due: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def emit(self, contract: Contract, prediction_id: str, row: Row, first: bool) -> None:
        """Add a labeled row; if it is the prediction's `first`, it counts for the delay of labels."""
        self.rows.append((prediction_id.encode(), ground_truth(row, contract, prediction_id)))
        if first and row.outcome is not None:
            self.delays[contract.stream].append(row.outcome.observed_at - row.said.predicted_at)

    def take_due(self, state: State, timers: str, watermark: int) -> list[str]:
        """What has a timer that is due, as far as one turn may go; the timers fire with it."""
        found = state.due(timers, watermark, TIMERS_PER_TURN)
        self.fired += found.keys
        self.timers += found.later
        self.more_due |= len(found.ids) >= TIMERS_PER_TURN
        return found.ids

    def set_aside(self, step: Step, stream: str, prediction_id: str | None, key: bytes) -> None:
        """Count what was dropped, and keep what is a dead letter; `key` is the record's."""
        for dropped in step.dropped:
            self.counts[dropped] += 1
        for letter in step.letters:
            self.letters.append(
                DeadLetter(
                    reason=letter.reason,
                    detail=letter.detail,
                    topic=getattr(self.topics, letter.topic),
                    partition=self.number,
                    offset=letter.offset,
                    key=key,
                    value=letter.record,
                    stream=stream,
                    prediction_id=prediction_id,
                )
            )
