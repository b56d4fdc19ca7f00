"""One partition of the join: the batch of events that came, joined with what is remembered, gives a `Turn`.

A turn is everything that is to be committed together. Nothing here talks to Kafka, and the state changes only by
`save`, after the commit: a turn that is thrown away leaves no trace.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec

from accrual.contract import Contract
from accrual.events import DeadLetter, Outcome, Prediction, Tick, instant, microseconds
from accrual.kafka import TopicNames
from streams import entity as by_entity
from streams.entity import Entity, Made
from streams.join import (
    Entry,
    Letter,
    Progress,
    Row,
    Step,
    Waiting,
    advance,
    apply_outcome,
    apply_prediction,
    due,
    ground_truth,
    is_pending,
    on_time,
    pack,
    seen_of,
)
from streams.routing import partitions_of
from streams.state import Record, State, Timer, entity_key, entity_timers, entry_key, progress_key, split_entry_key

TIMERS_PER_TURN = 20_000
LOOKED_AT = 1_000  # timers, for the oldest pending prediction

Entries = dict[bytes, Entry | None]
Entities = dict[bytes, Entity | None]


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
    """What one batch of one partition led to.

    `records` are for the changelog and the state; `rows` for ground truth, by the prediction's key; `strays` belong
    into another partition of their topic, by its number; `ticks` are to be written to this partition of the
    predictions; `counts`: what became of the events; `pending`: how many more predictions of a stream are pending, or
    fewer; `delays`: from prediction to outcome in microseconds, of those labeled for the first time. `soonest`,
    `timers` and `fired` are for the state: see `State.save`. `more_due`: more timers than one turn takes.
    """

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
        self._joins_entities = any(contract.join is not None for contract in contracts.values())
        self._heard: dict[str, float] = {}  # when each stream was last heard of, by the caller's clock

    def turn(self, arrivals: Arrivals, drained: Drained, now: float) -> Turn:
        """Join a batch and let event time pass. `now`: seconds of a clock that never jumps. Raises StateBroken."""
        turn = Turn()
        both = [*arrivals.predictions, *arrivals.outcomes]
        before = self.state.entries({arrival.key for arrival in both})
        entries = dict(before)
        known = self._entities_of(arrivals) if self._joins_entities else {}
        entities = dict(known)
        strays = self._find_strays({**before, **known}, [*both, *arrivals.claims])
        # Predictions go before outcomes of the same batch: fewer must wait.
        times = {}
        for topic, some in (("predictions", arrivals.predictions), ("outcomes", arrivals.outcomes)):
            times[topic] = self._join(turn, entries, entities, some, strays)
        times["outcomes"] |= self._keep_claims(turn, entities, arrivals.claims, strays)
        self._add_ticks(times, arrivals.ticks)
        progress = self._advance(turn, times, drained)
        if drained.predictions and drained.outcomes:
            turn.ticks = self._tick(progress, times, now)
        if self._joins_entities:
            self._settle_claims(turn, known, entities, before, entries, progress)
            self._remember_entities(turn, known, entities)
        turn.counts["labeled"] += len(turn.rows)
        self._fire(turn, before, entries, progress)
        self._remember(turn, before, entries)
        if arrivals or turn.fired:
            for stream, reached in progress.items():
                counted = msgspec.structs.replace(reached, pending=reached.pending + turn.pending[stream])
                if counted != self.state.progress.get(stream):
                    turn.records.append((progress_key(stream), pack(counted)))
        return turn

    def save(self, turn: Turn) -> None:
        """The turn is committed, and the changelog ends at `stands_at`. Raises StateBroken."""
        self.state.save(turn.records, self.stands_at, turn.soonest, turn.timers, turn.fired)

    def known(self, prediction_id: str) -> dict[str, Entry]:
        """What is known of one prediction id, by stream."""
        keys = {entry_key(stream, prediction_id): stream for stream in self._contracts}
        found = self.state.entries(keys)
        return {keys[key]: entry for key, entry in found.items() if entry is not None}

    def oldest_pending(self, stream: str) -> int | None:
        """When the oldest pending prediction was made, in microseconds, or a moment before; None if none is written."""
        contract = self._contracts[stream]
        ids, last = self.state.first_timed(stream, LOOKED_AT)
        found = self.state.entries({entry_key(stream, prediction_id) for prediction_id in ids})
        moments = [e.said.predicted_at for e in found.values() if e and e.said and is_pending(e, contract)]
        if moments or last is None:
            return min(moments, default=None)
        return last - contract.horizon_us

    def _entities_of(self, arrivals: Arrivals) -> Entities:
        """What is known of the entities of a batch."""
        keys = {claim.key for claim in arrivals.claims}
        for arrival in arrivals.predictions:
            if arrival.event.entity is not None:
                keys.add(entity_key(arrival.event.stream, arrival.event.entity))
        return self.state.entities(keys)

    def _find_strays(self, before: Mapping[bytes, object], arrivals: Sequence[Arrival]) -> dict[bytes, int]:
        """Keys of which nothing is known here and that belong elsewhere, with the number of their home partition."""
        new = {arrival.key: arrival.id_ for arrival in arrivals if before[arrival.key] is None}
        homes = partitions_of([*new.values()], self._partitions)
        return {key: home for key, home in zip(new, homes, strict=True) if home != self._number}

    def _join(
        self,
        turn: Turn,
        entries: Entries,
        entities: Entities,
        arrivals: Sequence[Arrival],
        strays: Mapping[bytes, int],
    ) -> defaultdict[str, list[int]]:
        """Apply the events of one topic that name their prediction; returns their times by stream."""
        times: defaultdict[str, list[int]] = defaultdict(list)
        watermarks = {stream: reached.watermark for stream, reached in self.state.progress.items()}
        for arrival in arrivals:
            key, event, at = arrival.key, arrival.event, arrival.at
            if key in strays:
                turn.strays.append((strays[key], arrival))
                continue
            stream = event.stream
            contract, before = self._contracts[stream], entries[key]
            if isinstance(event, Prediction):
                watermark = watermarks.get(stream, 0)
                step = apply_prediction(before, contract, event, at, arrival.offset, arrival.record, watermark)
                if contract.join is not None and before is None and step.entry is not None:
                    step = _enter(entities, contract, event, arrival, step)
                first = step.row is not None
                if step.entry is not before and not first:
                    turn.pending[stream] += 1
            else:
                step = apply_outcome(before, contract, seen_of(contract, event, at), arrival.offset, arrival.record)
                first = step.row is not None and before is not None and is_pending(before, contract)
                if first:
                    turn.pending[stream] -= 1
            entries[key] = step.entry
            if step.row is not None:
                _emit(turn, contract, event.prediction_id or "", step.row, first)
            if step.dropped or step.letters:
                self._set_aside(turn, step, stream, event.prediction_id, arrival.id_)
            times[stream].append(at)
        return times

    def _keep_claims(
        self, turn: Turn, entities: Entities, claims: Sequence[Arrival], strays: Mapping[bytes, int]
    ) -> defaultdict[str, list[int]]:
        """Outcomes that name an entity wait until it is known whose they are; returns their times by stream."""
        times: defaultdict[str, list[int]] = defaultdict(list)
        for claim in claims:
            if claim.key in strays:
                turn.strays.append((strays[claim.key], claim))
                continue
            event = cast(Outcome, claim.event)
            seen = seen_of(self._contracts[event.stream], event, claim.at)
            with_it = by_entity.add_outcome(entities[claim.key], Waiting(seen, claim.offset, claim.record))
            if with_it is None:
                turn.counts["duplicate_outcome"] += 1
            else:
                entities[claim.key] = with_it
            times[event.stream].append(claim.at)
        return times

    def _add_ticks(self, times: Mapping[str, defaultdict[str, list[int]]], ticks: Sequence[Tick]) -> None:
        """A tick is a moment that both topics have reached; nothing is due because of it alone."""
        for tick in ticks:
            for by_stream in times.values():
                by_stream[tick.tick].append(microseconds(tick.at))

    def _tick(
        self, progress: Mapping[str, Progress], times: Mapping[str, Mapping[str, list[int]]], now: float
    ) -> list[Tick]:
        """For each stream that has been silent for long enough, how far its event time has come by the clock."""
        ticks = []
        for stream, reached in progress.items():
            heard = self._heard.setdefault(stream, now)
            if any(stream in by_stream for by_stream in times.values()):
                self._heard[stream] = now
            elif (silence := (now - heard) * 1e6) >= self._contracts[stream].idle_us:
                self._heard[stream] = now
                ticks.append(Tick(tick=stream, at=instant(max(reached.predictions, reached.outcomes) + int(silence))))
        return ticks

    def _advance(
        self, turn: Turn, times: Mapping[str, Mapping[str, list[int]]], drained: Drained
    ) -> dict[str, Progress]:
        progress = dict(self.state.progress)
        for topic, by_stream in times.items():
            for stream, moments in by_stream.items():
                now = progress.get(stream, Progress())
                reached = max(getattr(now, topic), *moments)
                progress[stream] = msgspec.structs.replace(now, **{topic: reached})
                soonest = min(moments) + self._contracts[stream].horizon_us
                turn.soonest[stream] = min(soonest, turn.soonest.get(stream, soonest))
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

    def _due(self, turn: Turn, timers: str, watermark: int) -> list[str]:
        """What has a timer that is due, as far as one turn may go; the timers fire with the turn."""
        found = self.state.due(timers, watermark, TIMERS_PER_TURN)
        turn.fired += found.keys
        turn.timers += found.later
        turn.more_due |= len(found.ids) >= TIMERS_PER_TURN
        return found.ids

    def _settle_claims(
        self,
        turn: Turn,
        known: Entities,
        entities: Entities,
        before: Entries,
        entries: Entries,
        progress: Mapping[str, Progress],
    ) -> None:
        """Outcomes that a watermark has passed go to their predictions; what has none is an orphan."""
        for stream, now in progress.items():
            contract, timers = self._contracts[stream], entity_timers(stream)
            if contract.join is None:
                continue
            names = {entity_key(stream, name): name for name in self._due(turn, timers, now.watermark)}
            others = self.state.entities(names.keys() - entities.keys())
            known.update(others)
            entities.update(others)
            claims: list[by_entity.Claim] = []
            for key, name in names.items():
                entity = entities[key]
                if entity is None:
                    continue  # it was forgotten, and this timer is a leftover
                passed = by_entity.on_time(entity, contract, now.watermark)
                entities[key] = passed.entity
                claims += passed.claims
                self._set_aside(turn, Step(None, letters=passed.orphans), stream, None, name.encode())
                if passed.entity is not None:
                    turn.timers.append((timers, by_entity.due(passed.entity, contract), name))
            more = self.state.entries({entry_key(stream, claim.prediction_id) for claim in claims} - entries.keys())
            before.update(more)
            entries.update(more)
            for claim in claims:
                key = entry_key(stream, claim.prediction_id)
                entry, outcome = entries[key], claim.outcome
                step = apply_outcome(entry, contract, outcome.seen, outcome.offset, outcome.record)
                entries[key] = step.entry
                if step.row is not None:
                    first = entry is not None and is_pending(entry, contract)
                    turn.pending[stream] -= first
                    _emit(turn, contract, claim.prediction_id, step.row, first)

    def _remember_entities(self, turn: Turn, known: Entities, entities: Entities) -> None:
        """The same for entities as `_remember` does for entries."""
        for key, entity in entities.items():
            old = known[key]
            if entity == old:
                continue
            turn.records.append((key, None if entity is None else pack(entity)))
            if entity is not None:
                stream, name = split_entry_key(key)
                contract, timers = self._contracts[stream], entity_timers(stream)
                when = by_entity.due(entity, contract)
                turn.soonest[timers] = min(when, turn.soonest.get(timers, when))
                if old is not None and when < by_entity.due(old, contract):
                    turn.timers.append((timers, when, name))

    def _fire(self, turn: Turn, before: Entries, entries: Entries, progress: Mapping[str, Progress]) -> None:
        """Let the watermarks do their work: entries whose timers are due, as far as one turn may go."""
        for stream, now in progress.items():
            due_ids = self._due(turn, stream, now.watermark)
            ids = {entry_key(stream, prediction_id): prediction_id for prediction_id in due_ids}
            more = self.state.entries(ids.keys() - entries.keys())
            before.update(more)
            entries.update(more)
            contract = self._contracts[stream]
            for key, prediction_id in ids.items():
                entry = entries[key]
                if entry is None:
                    continue  # it was forgotten, and this timer is a leftover
                step = on_time(entry, contract, now.watermark)
                entries[key] = step.entry
                if step.row is not None:
                    turn.rows.append((prediction_id.encode(), ground_truth(step.row, contract, prediction_id)))
                    turn.counts["expired"] += 1
                    turn.pending[stream] -= 1
                self._set_aside(turn, step, stream, prediction_id, prediction_id.encode())
                if step.entry is not None:
                    turn.timers.append((stream, due(step.entry, contract), prediction_id))

    def _remember(self, turn: Turn, before: Entries, entries: Entries) -> None:
        """Records of what changed, and timers of what was known and is due earlier than it was."""
        records, timers = turn.records, turn.timers
        for key, entry in entries.items():
            old = before[key]
            if entry is old:
                continue
            if entry is None:
                records.append((key, None))
                continue
            records.append((key, pack(entry)))
            if old is not None and old.said is None:  # once the prediction is there, only later things can be due
                stream, prediction_id = split_entry_key(key)
                contract = self._contracts[stream]
                when = due(entry, contract)
                if when < due(old, contract):
                    timers.append((stream, when, prediction_id))

    def _set_aside(self, turn: Turn, step: Step, stream: str, prediction_id: str | None, key: bytes) -> None:
        """Count what was dropped, and keep what is a dead letter; `key` is the record's."""
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
                    key=key,
                    value=letter.record,
                    stream=stream,
                    prediction_id=prediction_id,
                )
            )


def _enter(entities: Entities, contract: Contract, event: Prediction, arrival: Arrival, step: Step) -> Step:
    """A new prediction of an entity: its step, unless an outcome that would be its own was given away before."""
    key, made = entity_key(event.stream, event.entity or ""), Made(arrival.at, event.prediction_id)
    if by_entity.is_refused(entities[key], contract, made):
        detail = f"made at {instant(made.predicted_at).isoformat()}; an outcome after it was given to another before"
        return Step(None, letters=(Letter("too_old", detail, "predictions", arrival.offset, arrival.record),))
    entities[key] = by_entity.add_prediction(entities[key], made)
    return step


def _emit(turn: Turn, contract: Contract, prediction_id: str, row: Row, first: bool) -> None:
    """A labeled row; if it is the prediction's `first`, it counts for the delay of labels."""
    turn.rows.append((prediction_id.encode(), ground_truth(row, contract, prediction_id)))
    if first and row.outcome is not None:
        turn.delays[contract.stream].append(row.outcome.observed_at - row.said.predicted_at)
