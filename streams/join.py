"""The join, pure: what is known of one prediction, and what follows from each thing that happens to it.

An `Entry` is all that is kept of one prediction id of one stream. An event or the passing of event time gives a `Step`:
the next entry, and what to emit. There is no clock, no I/O and no Kafka here, and the result is a function of the set
of events: either side may come first, twice or late, and the row of the highest revision is the same.

Times are microseconds since 1970 (`accrual.events.microseconds`); `watermark` is how far event time has come.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import msgspec

from accrual.contract import CENSORED, Contract
from accrual.events import Outcome, Prediction, encode_ground_truth, instant
from streams.label import Decision, Seen, decide, is_same, keep


class Said(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The content of a prediction; `inputs` and `output` are the JSON as it was sent."""

    predicted_at: int
    model: str
    inputs: bytes
    output: bytes
    entity: str | None = None


class Waiting(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An outcome whose prediction has not come, with the record it came in: it may end as a dead letter."""

    seen: Seen
    offset: int
    record: bytes


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one prediction.

    `said`: the prediction, once it has come. `kept`: of the outcomes that count, those on which the label depends.
    `revision`: how many distinct ones count. `expired`: the expired row was emitted.
    `known`: a digest of every distinct outcome that is not kept, to recognise it when it comes again.
    `waiting`: see `Waiting`.
    """

    said: Said | None = None
    kept: tuple[Seen, ...] = ()
    revision: int = 0
    expired: bool = False
    known: tuple[bytes, ...] = ()
    waiting: tuple[Waiting, ...] = ()


class Letter(msgspec.Struct, frozen=True, gc=False):
    """A record that ends as a dead letter: it came in `topic` (of the entry's partition) at `offset`."""

    reason: str
    detail: str
    topic: Literal["predictions", "outcomes"]
    offset: int
    record: bytes


class Row(msgspec.Struct, frozen=True, gc=False):
    """What became of a prediction: its label by `outcome`, or without one that it expired."""

    said: Said
    revision: int
    label: str | None
    outcome: Seen | None


class Step(msgspec.Struct, frozen=True, gc=False):
    """What follows: the next entry (None: nothing is known any more), a row, dead letters.

    `dropped` names, for the counters, each event that ends here by right: `duplicate_prediction`, `duplicate_outcome`,
    `late_outcome`.
    """

    entry: Entry | None
    row: Row | None = None
    letters: tuple[Letter, ...] = ()
    dropped: tuple[str, ...] = ()


class Progress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far one stream's event time has come in one partition: the latest event of each topic, and the watermark.

    Zero means nothing yet. `pending` is how many predictions have no label and have not expired.
    """

    predictions: int = 0
    outcomes: int = 0
    watermark: int = 0
    pending: int = 0


pack = msgspec.msgpack.Encoder().encode
unpack_entry = msgspec.msgpack.Decoder(Entry).decode
unpack_progress = msgspec.msgpack.Decoder(Progress).decode


def apply_prediction(
    entry: Entry | None, contract: Contract, event: Prediction, at: int, offset: int, record: bytes, watermark: int
) -> Step:
    """A prediction made `at` came. The first one with its id counts; outcomes that wait for it are joined at once."""
    said = Said(at, event.model, bytes(event.inputs), bytes(event.output), event.entity)
    if entry is not None and entry.said is not None:
        if entry.said == said:
            return Step(entry, dropped=("duplicate_prediction",))
        detail = f"model {said.model} at {instant(said.predicted_at).isoformat()}; the first was {entry.said.model}"
        return Step(entry, letters=(Letter("conflicting_prediction", detail, "predictions", offset, record),))
    if _forgotten_after(contract, said) < watermark:
        detail = f"watermark {instant(watermark).isoformat()} has passed its horizon by more than {contract.remember}"
        return Step(entry, letters=(Letter("too_old", detail, "predictions", offset, record),))
    if entry is None:
        return Step(Entry(said))
    counting = [w.seen for w in entry.waiting if _counts(contract, said, w.seen)]
    late = [w for w in entry.waiting if not _counts(contract, said, w.seen)]
    joined = Entry(said, known=tuple(digest(w.seen) for w in late))
    if counting:
        joined = _count(joined, contract, *counting)
    return Step(
        joined,
        _labeled(joined, said, contract),
        tuple(_late_letter(contract, w) for w in late) if contract.late == "dead_letter" else (),
        ("late_outcome",) * len(late) if contract.late == "count" else (),
    )


def seen_of(contract: Contract, event: Outcome, at: int) -> Seen:
    """The content of an outcome observed `at`, and what it says."""
    values = bytes(event.values)
    return Seen(at, values, event.source, contract.says(values))


def apply_outcome(entry: Entry | None, contract: Contract, seen: Seen, offset: int, record: bytes) -> Step:
    """An outcome came: it is a revision, waits for its prediction, or is too late to count."""
    entry = Entry() if entry is None else entry
    if _is_known(entry, seen):
        return Step(entry, dropped=("duplicate_outcome",))
    if entry.said is None:
        return Step(Entry(waiting=(*entry.waiting, Waiting(seen, offset, record))))
    if not _counts(contract, entry.said, seen):
        ignored = msgspec.structs.replace(entry, known=(*entry.known, digest(seen)))
        if contract.late == "dead_letter":
            return Step(ignored, letters=(_late_letter(contract, Waiting(seen, offset, record)),))
        return Step(ignored, dropped=("late_outcome",))
    if entry.revision == 0 and contract.label.first_decides:  # as nearly always; what follows here says the same
        revised = Entry(entry.said, (seen,), 1, entry.expired, entry.known)
        return Step(revised, Row(entry.said, 1, seen.says, seen))
    revised = _count(entry, contract, seen)
    return Step(revised, _labeled(revised, entry.said, contract))


def on_time(entry: Entry, contract: Contract, watermark: int) -> Step:
    """Event time has come as far as `watermark`: expire, give up orphans, forget, whatever is due; often nothing."""
    if entry.said is None:
        orphans = [w for w in entry.waiting if _orphaned_after(contract, w) < watermark]
        rest = tuple(w for w in entry.waiting if _orphaned_after(contract, w) >= watermark)
        left = Entry(waiting=rest) if rest else None
        letters = tuple(orphan_letter(w, "no prediction with its id came") for w in orphans)
        return Step(left if orphans else entry, letters=letters)
    said, row = entry.said, None
    if is_pending(entry, contract) and deadline(contract, said) <= watermark:
        # Its revision is 0 also where outcomes count, but too few for a label: those to come will make a higher one.
        row = Row(said, 0, None if contract.on_expiry == CENSORED else contract.on_expiry, None)
        entry = msgspec.structs.replace(entry, expired=True)
    forgotten = _forgotten_after(contract, said) < watermark
    return Step(None if forgotten else entry, row)


def due(entry: Entry, contract: Contract) -> int:
    """The watermark at which `on_time` next has something to do for this entry."""
    said = entry.said
    if said is None:
        return min(_orphaned_after(contract, w) for w in entry.waiting) + 1
    return deadline(contract, said) if is_pending(entry, contract) else _forgotten_after(contract, said) + 1


def decision(entry: Entry, contract: Contract) -> Decision | None:
    """The prediction's label and the outcome it comes from; None if there is none yet."""
    return decide(contract.label, entry.kept, entry.revision)


def ground_truth(row: Row, contract: Contract, prediction_id: str) -> bytes:
    """The row as it is on the wire."""
    said, outcome = row.said, row.outcome
    return encode_ground_truth(
        prediction_id=prediction_id,
        stream=contract.stream,
        revision=row.revision,
        status="expired" if outcome is None else "labeled",
        label=row.label,
        model=said.model,
        predicted_at=said.predicted_at,
        observed_at=None if outcome is None else outcome.observed_at,
        inputs=said.inputs,
        output=said.output,
        values=b"null" if outcome is None else outcome.values,
        source=None if outcome is None else outcome.source,
        entity=said.entity,
    )


def is_pending(entry: Entry, contract: Contract) -> bool:
    """Whether it is a prediction that has no label and has not expired."""
    if entry.said is None or entry.expired:
        return False
    rule = contract.label
    return entry.revision < rule.complete_when or (rule.take == "sum" and decision(entry, contract) is None)


def deadline(contract: Contract, said: Said) -> int:
    """Until when an outcome is in time, and when the prediction expires without one."""
    return said.predicted_at + contract.horizon_us


def advance(progress: Progress, contract: Contract, *, predictions_drained: bool, outcomes_drained: bool) -> Progress:
    """Move the watermark to where the slower topic is, less the contract's disorder; it never goes back.

    A drained topic has nothing more to read at the moment and holds nothing back (docs/decisions/0002).
    """
    behind = []
    if not predictions_drained:
        behind.append(progress.predictions)
    if not outcomes_drained:
        behind.append(progress.outcomes)
    reached = min(behind) if behind else max(progress.predictions, progress.outcomes)
    watermark = max(progress.watermark, reached - contract.disorder_us)
    return progress if watermark == progress.watermark else msgspec.structs.replace(progress, watermark=watermark)


def _counts(contract: Contract, said: Said, seen: Seen) -> bool:
    return contract.late == "revise" or seen.observed_at <= deadline(contract, said)


def _forgotten_after(contract: Contract, said: Said) -> int:
    return said.predicted_at + contract.horizon_us + contract.remember_us


def _orphaned_after(contract: Contract, outcome: Waiting) -> int:
    return outcome.seen.observed_at + contract.horizon_us + contract.disorder_us


def _count(entry: Entry, contract: Contract, *new: Seen) -> Entry:
    """The entry with these outcomes, that are new to it and count."""
    outcomes = entry.kept + new
    kept, known = keep(contract.label, outcomes), entry.known
    if len(kept) < len(outcomes):
        known += tuple(digest(seen) for seen in outcomes if seen not in kept)
    return Entry(entry.said, kept, entry.revision + len(new), entry.expired, known)


def _is_known(entry: Entry, seen: Seen) -> bool:
    for kept in entry.kept:
        if is_same(seen, kept):
            return True
    for waiting in entry.waiting:
        if is_same(seen, waiting.seen):
            return True
    return len(entry.known) > 0 and digest(seen) in entry.known


def _labeled(entry: Entry, said: Said, contract: Contract) -> Row | None:
    decided = decision(entry, contract)
    return None if decided is None else Row(said, entry.revision, decided.label, decided.outcome)


def digest(seen: Seen) -> bytes:
    """Eight bytes that tell the few outcomes of one prediction apart."""
    content = b"%d %d %b%b" % (seen.observed_at, len(seen.values), seen.values, seen.source.encode())
    return blake2b(content, digest_size=8).digest()


def _late_letter(contract: Contract, outcome: Waiting) -> Letter:
    detail = f"observed at {instant(outcome.seen.observed_at).isoformat()}, after the horizon of {contract.horizon}"
    return Letter("late", detail, "outcomes", outcome.offset, outcome.record)


def orphan_letter(outcome: Waiting, why: str) -> Letter:
    """The dead letter of an outcome that belongs to no prediction."""
    detail = f"observed at {instant(outcome.seen.observed_at).isoformat()}; {why}"
    return Letter("orphan", detail, "outcomes", outcome.offset, outcome.record)
