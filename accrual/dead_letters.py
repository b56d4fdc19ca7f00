"""Dead letters in a person's hands: chosen from their topic, explained, and sent again.

A letter is named by its offset in the dead-letters topic, the source of truth: the lake has the same letters, later.
A replay writes the original bytes under the original key to the original topic, as a new record with the header
`REPLAYED`, and leaves the letter where it is. The record is then judged like any other; sent twice, its second copy is
dropped as the duplicate it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import NamedTuple

import msgspec

from accrual.config import Config
from accrual.errors import BrokerUnavailable
from accrual.events import MAX_EVENT_BYTES, DeadLetter, decode_dead_letter, instant, microseconds
from accrual.kafka import KafkaError, Message, TopicNames, first_offsets_since, producer, read_to_end

log = logging.getLogger(__name__)

REPLAYED = "accrual-replayed"


class Advice(NamedTuple):
    """What a person does about letters of one reason, and what becomes of one that is replayed."""

    todo: str
    replayed: str


_AGAIN = "a dead letter again: the bytes are the same"
_MEND = "mend the producer and have it send the event anew"
_WIDEN = "mend the producer; or, if the contract is too narrow, widen it, restart sink and workers, and replay"
_WIDENED = "joined if the contract now allows it, else a dead letter again"

ADVICE = {
    "too_large": Advice(
        "send less, such as a reference in place of a document; the whole record is still in its topic",
        "refused: the letter holds the beginning only",
    ),
    "not_json": Advice(_MEND, _AGAIN),
    "invalid_event": Advice(_MEND, _AGAIN),
    "unsupported_version": Advice(
        "upgrade sink and workers, then replay", "joined if the workers now know the version, else a dead letter again"
    ),
    "unknown_stream": Advice(
        "add the stream's contract, restart sink and workers, then replay",
        "joined if the stream now has a contract, else a dead letter again",
    ),
    "invalid_id": Advice(_MEND, "a dead letter again: the key and the bytes are the same"),
    "time_out_of_range": Advice(
        "set the producer's clock right; an event from the future can be replayed when its time has come",
        "joined if the broker's clock is by now within max_ahead of the event's time, else a dead letter again",
    ),
    "invalid_inputs": Advice(_WIDEN, _WIDENED),
    "invalid_output": Advice(_MEND, _AGAIN),
    "invalid_values": Advice(_WIDEN, _WIDENED),
    "conflicting_prediction": Advice(
        "find out why two predictions share an id: each needs its own", "a dead letter again: the first still counts"
    ),
    "late": Advice(
        "nothing if the horizon is right; a longer one holds for outcomes to come",
        "dropped as a duplicate for as long as its prediction is remembered, then an orphan",
    ),
    "too_old": Advice(
        "send predictions sooner: before their horizon and the contract's `remember` have passed, and with `join`"
        " within its `disorder`",
        "a dead letter again, unless the contract now remembers longer",
    ),
    "orphan": Advice(
        "find out where its prediction is; once that has come, replay",
        "joined if its prediction has come, else an orphan again; with `join` dropped as a duplicate",
    ),
}


class Filed(NamedTuple):
    """A dead letter, its offset in the dead-letters topic, and when it arrived there."""

    offset: int
    arrived_at: datetime
    letter: DeadLetter

    @property
    def record(self) -> str:
        """Where the original is: `topic[partition]@offset`."""
        return f"{self.letter.topic}[{self.letter.partition}]@{self.letter.offset}"


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters: those that fit everything that is given. `topic` is an input topic with or without its prefix.

    `since` and `until` bound the letter's arrival: since <= arrived_at < until.
    """

    offsets: frozenset[int] = frozenset()
    reason: str | None = None
    stream: str | None = None
    prediction_id: str | None = None
    topic: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def fits(self, filed: Filed) -> bool:
        """Whether this letter is one of them."""
        letter = filed.letter
        return (
            (not self.offsets or filed.offset in self.offsets)
            and self.reason in (None, letter.reason)
            and self.stream in (None, letter.stream)
            and self.prediction_id in (None, letter.prediction_id)
            and (self.topic is None or f".{letter.topic}".endswith(f".{self.topic}"))
            and (self.since is None or self.since <= filed.arrived_at)
            and (self.until is None or filed.arrived_at < self.until)
        )


def read_letters(config: Config, choice: Choice) -> Iterator[Filed]:
    """The chosen letters in the order in which they arrived. Raises BrokerUnavailable."""
    topic = TopicNames(config.topics.prefix).dead_letters
    starts = {0: min(choice.offsets)} if choice.offsets else None
    if choice.since is not None and starts is None:
        starts = first_offsets_since(config, topic, _milliseconds(choice.since))
    for message in read_to_end(config, topic, starts):
        offset = message.offset() or 0
        try:
            letter = decode_dead_letter(message.value() or b"")
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            log.warning("record %d of %s is no dead letter: %s", offset, topic, exc)
            continue
        filed = Filed(offset, _arrival(message), letter)
        if choice.fits(filed):
            yield filed


def why_not(config: Config, filed: Filed) -> str | None:
    """Why this letter cannot be replayed; None if it can."""
    names = TopicNames(config.topics.prefix)
    if filed.letter.reason == "too_large":
        return (
            f"it holds only the first {MAX_EVENT_BYTES} bytes; the whole record is at {filed.record} until the topic's"
            " retention deletes it"
        )
    if filed.letter.topic not in (names.predictions, names.outcomes):
        return f"it came from {filed.letter.topic}, which is neither {names.predictions} nor {names.outcomes}"
    return None


def replay(config: Config, letters: Iterable[Filed], written: Callable[[], None]) -> dict[int, str]:
    """Write the letters' original records to their topics anew; `written` is called as each is acknowledged.

    Returns the offsets of those that the broker refused, with its reason. Raises BrokerUnavailable if it stops
    answering: then those it acknowledged are replayed, and doing it all again does no harm.
    """
    refused: dict[int, str] = {}

    def reporter(offset: int) -> Callable[[KafkaError | None, Message], None]:
        def report(error: KafkaError | None, _message: Message) -> None:
            if error is None:
                written()
            else:
                refused[offset] = error.str()

        return report

    # What came compressed may only fit compressed.
    large: dict[str, str | int] = {"message.max.bytes": 2 * MAX_EVENT_BYTES, "compression.type": "lz4"}
    sender = producer(config, **large)
    for filed in letters:
        while True:
            try:
                sender.produce(
                    filed.letter.topic,
                    filed.letter.value,
                    filed.letter.key,
                    headers={REPLAYED: str(filed.offset)},
                    on_delivery=reporter(filed.offset),
                )
                break
            except BufferError:
                sender.poll(0.1)
        sender.poll(0)
    if left := sender.flush(60.0):
        raise BrokerUnavailable(f"the broker did not take {left} of the records within 60 s; replay them again")
    return refused


def replayed_since(config: Config, moment: datetime) -> dict[int, datetime]:
    """When each letter was last replayed, by its offset: read from the headers of all records that came since then.

    The cost is that of reading both input topics from that moment on. Raises BrokerUnavailable.
    """
    names = TopicNames(config.topics.prefix)
    found: dict[int, datetime] = {}
    for topic in (names.predictions, names.outcomes):
        for message in read_to_end(config, topic, first_offsets_since(config, topic, _milliseconds(moment))):
            offset = dict(message.headers() or ()).get(REPLAYED)
            if isinstance(offset, bytes) and offset.isdigit():
                at = _arrival(message)
                found[int(offset)] = max(at, found.get(int(offset), at))
    return found


def _arrival(message: Message) -> datetime:
    return instant(message.timestamp()[1] * 1000)


def _milliseconds(moment: datetime) -> int:
    return microseconds(moment) // 1000
