"""Outcomes that name an entity, in one turn of a partition: they wait, and then go to the predictions they belong to.

`streams.entity` decides whose they are; here is what that needs of the state, and what it changes in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import cast

from accrual.contract import Contract
from accrual.events import Outcome, Prediction, instant
from streams import entity as by_entity
from streams.entity import Claim, Entity, Made
from streams.join import Entry, Letter, Progress, Step, Waiting, apply_outcome, is_pending, pack, seen_of
from streams.state import State, entity_key, entity_timers, entry_key, split_entry_key
from streams.turn import Arrival, Arrivals, Turn

Entries = dict[bytes, Entry | None]


class Claims:
    """The entities of one turn: `known` as the state has them, and as the turn leaves them."""

    def __init__(self, turn: Turn, state: State, contracts: Mapping[str, Contract], arrivals: Arrivals) -> None:
        """Look up the entities of a batch. Raises StateBroken."""
        keys = {claim.key for claim in arrivals.claims}
        for arrival in arrivals.predictions:
            if arrival.event.entity is not None:
                keys.add(entity_key(arrival.event.stream, arrival.event.entity))
        self.known = state.entities(keys)
        self._now: dict[bytes, Entity | None] = dict(self.known)
        self._turn = turn
        self._state = state
        self._contracts = contracts

    def enter(self, contract: Contract, event: Prediction, arrival: Arrival, step: Step) -> Step:
        """A new prediction of an entity: its step, unless an outcome that would be its own was given away before."""
        key, made = entity_key(event.stream, event.entity or ""), Made(arrival.at, event.prediction_id)
        if by_entity.is_refused(self._now[key], contract, made):
            detail = (
                f"made at {instant(made.predicted_at).isoformat()}; an outcome after it was given to another before"
            )
            return Step(None, letters=(Letter("too_old", detail, "predictions", arrival.offset, arrival.record),))
        self._now[key] = by_entity.add_prediction(self._now[key], made)
        return step

    def keep(self, claims: Sequence[Arrival], strays: Mapping[bytes, int]) -> defaultdict[str, list[int]]:
        """Outcomes that name an entity wait until it is known whose they are; returns their times by stream."""
        times: defaultdict[str, list[int]] = defaultdict(list)
        for claim in claims:
            if claim.key in strays:
                self._turn.strays.append((strays[claim.key], claim))
                continue
            event = cast(Outcome, claim.event)
            seen = seen_of(self._contracts[event.stream], event, claim.at)
            with_it = by_entity.add_outcome(self._now[claim.key], Waiting(seen, claim.offset, claim.record))
            if with_it is None:
                self._turn.counts["duplicate_outcome"] += 1
            else:
                self._now[claim.key] = with_it
            times[event.stream].append(claim.at)
        return times

    def settle(self, before: Entries, entries: Entries, progress: Mapping[str, Progress]) -> None:
        """Outcomes that a watermark has passed go to their predictions; what has none is an orphan."""
        for stream, now in progress.items():
            contract = self._contracts[stream]
            if contract.join is None:
                continue
            claims = self._let_pass(contract, now.watermark)
            more = self._state.entries({entry_key(stream, claim.prediction_id) for claim in claims} - entries.keys())
            before.update(more)
            entries.update(more)
            for claim in claims:
                key, outcome = entry_key(stream, claim.prediction_id), claim.outcome
                entry = entries[key]
                step = apply_outcome(entry, contract, outcome.seen, outcome.offset, outcome.record)
                entries[key] = step.entry
                if step.row is not None:
                    first = entry is not None and is_pending(entry, contract)
                    self._turn.pending[stream] -= first
                    self._turn.emit(contract, claim.prediction_id, step.row, first)

    def remember(self) -> None:
        """Records of the entities that changed, and timers of what was known and is due earlier than it was."""
        turn = self._turn
        for key, entity in self._now.items():
            old = self.known[key]
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

    def _let_pass(self, contract: Contract, watermark: int) -> list[Claim]:
        """What follows for the entities whose timers are due: the claims of their outcomes."""
        turn, timers = self._turn, entity_timers(contract.stream)
        names = {entity_key(contract.stream, name): name for name in turn.take_due(self._state, timers, watermark)}
        others = self._state.entities(names.keys() - self._now.keys())
        self.known.update(others)
        self._now.update(others)
        claims: list[Claim] = []
        for key, name in names.items():
            entity = self._now[key]
            if entity is None:
                continue  # it was forgotten, and this timer is a leftover
            passed = by_entity.on_time(entity, contract, watermark)
            self._now[key] = passed.entity
            claims += passed.claims
            turn.set_aside(Step(None, letters=passed.orphans), contract.stream, None, name.encode())
            if passed.entity is not None:
                turn.timers.append((timers, by_entity.due(passed.entity, contract), name))
        return claims
