"""One partition of the join: the batch of events that came, joined with what is remembered, gives a `Turn`.

A turn is everything that is to be committed together. Nothing here talks to Kafka, and the state changes only by
`save`, after the commit: a turn that is thrown away leaves no trace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from accrual.contract import Contract
from accrual.events import Prediction, Tick, instant, microseconds
from accrual.kafka import TopicNames
from streams.claims import Claims, Entries
from streams.join import (
    Entry,
    Progress,
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
from streams.state import State, entry_key, progress_key, split_entry_key
from streams.turn import Arrival, Arrivals, Drained, Turn

LOOKED_AT = 1_000  # timers, for the oldest pending prediction


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
        turn = Turn(self._number, self._topics)
        both = [*arrivals.predictions, *arrivals.outcomes]
        before = self.state.entries({arrival.key for arrival in both})
        entries = dict(before)
        claims = Claims(turn, self.state, self._contracts, arrivals) if self._joins_entities else None
        known = {**before, **claims.known} if claims else before
        strays = self._find_strays(known, [*both, *arrivals.claims])
        # Predictions go before outcomes of the same batch: fewer must wait.
        times = {}
        for topic, some in (("predictions", arrivals.predictions), ("outcomes", arrivals.outcomes)):
            times[topic] = self._join(turn, entries, claims, some, strays)
        if claims:
            times["outcomes"] |= claims.keep(arrivals.claims, strays)
        self._add_ticks(times, arrivals.ticks)
        progress = self._advance(turn, times, drained)
        if drained.predictions and drained.outcomes:
            turn.ticks = self._tick(progress, times, now)
        if claims:
            claims.settle(before, entries, progress)
            claims.remember()
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

    def _find_strays(self, before: Mapping[bytes, object], arrivals: Sequence[Arrival]) -> dict[bytes, int]:
        """Keys of which nothing is known here and that belong elsewhere, with the number of their home partition."""
        new = {arrival.key: arrival.id_ for arrival in arrivals if before[arrival.key] is None}
        homes = partitions_of([*new.values()], self._partitions)
        return {key: home for key, home in zip(new, homes, strict=True) if home != self._number}

    def _join(
        self,
        turn: Turn,
        entries: Entries,
        claims: Claims | None,
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
                if claims and contract.join is not None and before is None and step.entry is not None:
                    step = claims.enter(contract, event, arrival, step)
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
                turn.emit(contract, event.prediction_id or "", step.row, first)
            if step.dropped or step.letters:
                turn.set_aside(step, stream, event.prediction_id, arrival.id_)
            times[stream].append(at)
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

    def _fire(self, turn: Turn, before: Entries, entries: Entries, progress: Mapping[str, Progress]) -> None:
        """Let the watermarks do their work: entries whose timers are due, as far as one turn may go."""
        for stream, now in progress.items():
            due_ids = turn.take_due(self.state, stream, now.watermark)
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
                turn.set_aside(step, stream, prediction_id, prediction_id.encode())
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
