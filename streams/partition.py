"""One partition of the join: the batch of events that came, joined with what is remembered, gives a `Turn`.

A turn is everything that is to be committed together. Nothing here talks to Kafka, and the state changes only by
`save`, after the commit: a turn that is thrown away leaves no trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from operator import itemgetter
from typing import NamedTuple

import msgspec

from accrual.contract import Contract
from accrual.events import DeadLetter, Outcome, Prediction, encode, microseconds
from accrual.kafka import TopicNames, partition_of
from streams.join import Entry, Progress, Step, advance, apply_outcome, apply_prediction, due, on_time, pack
from streams.state import Record, State, entry_key, progress_key, split_entry_key, timed_id, timer_key

TIMERS_PER_TURN = 20_000

Entries = dict[bytes, Entry | None]


class Arrival(NamedTuple):
    """A valid event with its place in its topic and its original bytes; `key` is its entry's."""

    key: bytes
    is_outcome: bool
    offset: int
    event: Prediction | Outcome
    record: bytes


class Drained(NamedTuple):
    """Which of a partition's two topics have nothing more to read at the moment."""

    predictions: bool = False
    outcomes: bool = False


@dataclass(slots=True)
class Turn:
    """What one batch of one partition led to.

    `records` are for the changelog and the state; `rows` for ground truth, by the prediction's key; `strays` belong
    into another partition of their topic, by its number; `counts`: what became of the events.
    """

    records: list[Record] = field(default_factory=list)
    rows: list[tuple[bytes, bytes]] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    strays: list[tuple[int, Arrival]] = field(default_factory=list)
    timers: list[bytes] = field(default_factory=list)
    fired: list[bytes] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Partition:
    """One partition of the join. One thread at a time."""

    def __init__(
        self, number: int, partitions: int, state: State, contracts: Mapping[str, Contract], topics: TopicNames
    ) -> None:
        self.state = state
        self.stands_at = state.offset  # where the changelog's partition now ends
        self._number = number
        self._partitions = partitions
        self._contracts = contracts
        self._topics = topics

    def turn(self, arrivals: Sequence[Arrival], drained: Drained) -> Turn:
        """Join a batch and let event time pass. Raises StateBroken."""
        turn = Turn()
        before = self.state.entries(sorted({arrival.key for arrival in arrivals}))
        entries = dict(before)
        newest = self._join(turn, entries, arrivals)
        progress = self._advance(newest, drained)
        self._fire(turn, before, entries, progress)
        self._remember(turn, before, entries)
        if arrivals or turn.fired:
            turn.records += [
                (progress_key(stream), pack(now))
                for stream, now in progress.items()
                if now != self.state.progress.get(stream)
            ]
        return turn

    def save(self, turn: Turn) -> None:
        """The turn is committed, and the changelog ends at `stands_at`. Raises StateBroken."""
        self.state.save(turn.records, turn.timers, turn.fired, self.stands_at)

    def known(self, prediction_id: str) -> dict[str, Entry]:
        """What is known of one prediction id, by stream."""
        keys = {entry_key(stream, prediction_id): stream for stream in self._contracts}
        found = self.state.entries(sorted(keys))
        return {keys[key]: entry for key, entry in found.items() if entry is not None}

    def _join(self, turn: Turn, entries: Entries, arrivals: Sequence[Arrival]) -> dict[tuple[str, bool], datetime]:
        """Apply the events; returns the latest event time of each stream and topic.

        Predictions go before outcomes of the same batch: fewer must wait.
        """
        newest: dict[tuple[str, bool], datetime] = {}
        for arrival in sorted(arrivals, key=itemgetter(0, 1, 2)):
            key, is_outcome, offset, event, record = arrival
            entry, contract = entries[key], self._contracts[event.stream]
            if entry is None and (home := partition_of(event.prediction_id.encode(), self._partitions)) != self._number:
                turn.strays.append((home, arrival))
                continue
            if isinstance(event, Prediction):
                moment = event.predicted_at
                watermark = self.state.progress.get(event.stream, Progress()).watermark
                step = apply_prediction(entry, contract, event, offset, record, watermark)
            else:
                moment = event.observed_at
                step = apply_outcome(entry, contract, event, offset, record)
            self._emit(turn, entries, key, event.prediction_id, event.stream, step)
            seen = newest.get((event.stream, is_outcome))
            if seen is None or seen < moment:
                newest[event.stream, is_outcome] = moment
        return newest

    def _advance(self, newest: Mapping[tuple[str, bool], datetime], drained: Drained) -> dict[str, Progress]:
        progress = dict(self.state.progress)
        for (stream, is_outcome), moment in newest.items():
            now = progress.get(stream, Progress())
            topic = "outcomes" if is_outcome else "predictions"
            reached = max(getattr(now, topic), microseconds(moment))
            progress[stream] = msgspec.structs.replace(now, **{topic: reached})
        return {
            stream: advance(
                now,
                self._contracts[stream],
                predictions_drained=drained.predictions,
                outcomes_drained=drained.outcomes,
            )
            for stream, now in progress.items()
            if stream in self._contracts
        }

    def _fire(self, turn: Turn, before: Entries, entries: Entries, progress: Mapping[str, Progress]) -> None:
        """Let the watermarks do their work: entries whose timers are due, as far as one turn may go."""
        for stream, now in progress.items():
            fired = self.state.timers(stream, now.watermark, TIMERS_PER_TURN - len(turn.fired))
            if not fired:
                continue
            ids = {
                entry_key(stream, prediction_id): prediction_id
                for prediction_id in {timed_id(k, stream) for k in fired}
            }
            found = self.state.entries(sorted(ids.keys() - entries.keys()))
            before.update(found)
            entries.update(found)
            for key, prediction_id in ids.items():
                entry = entries[key]
                if entry is not None:  # else it was forgotten, and this timer is a leftover
                    contract = self._contracts[stream]
                    self._emit(
                        turn,
                        entries,
                        key,
                        prediction_id,
                        stream,
                        on_time(entry, contract, prediction_id, now.watermark),
                    )
                    kept = entries[key]
                    if kept is not None:
                        turn.timers.append(timer_key(stream, due(kept, contract), prediction_id))
            turn.fired += fired

    def _remember(self, turn: Turn, before: Entries, entries: Entries) -> None:
        """Records of what changed, and timers of what is due earlier than it was."""
        for key, entry in entries.items():
            old = before[key]
            if entry is old:
                continue
            turn.records.append((key, None if entry is None else pack(entry)))
            if entry is not None:
                stream, prediction_id = split_entry_key(key)
                contract = self._contracts[stream]
                when = due(entry, contract)
                if old is None or when < due(old, contract):
                    turn.timers.append(timer_key(stream, when, prediction_id))

    def _emit(self, turn: Turn, entries: Entries, key: bytes, prediction_id: str, stream: str, step: Step) -> None:
        entries[key] = step.entry
        if step.row is not None:
            turn.rows.append((prediction_id.encode(), encode(step.row)))
            turn.counts[step.row.status] += 1
        for dropped in step.dropped:
            turn.counts[dropped] += 1
        for letter in step.letters:
            turn.letters.append(
                DeadLetter(
                    reason=letter.reason,
                    detail=letter.detail,
                    topic=getattr(self._topics, letter.topic),
                    partition=self._number,
                    offset=letter.offset,
                    key=prediction_id.encode(),
                    value=letter.record,
                    stream=stream,
                    prediction_id=prediction_id,
                )
            )
