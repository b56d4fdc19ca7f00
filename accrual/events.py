"""The events on the wire: JSON, one struct each, versioned by `v`.

`schemas/` holds the JSON Schema of each, exported from here. Times are RFC 3339 with a zone. `inputs`, `output` and
`values` stay raw JSON until the contract of the event's stream checks them, so that what was sent is what is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Literal, TypeVar

import msgspec

from accrual.contract import MAX_ID_LENGTH, Contract
from accrual.errors import Rejected

VERSION = 1

MAX_EVENT_BYTES = 1 << 20

REASONS = {
    "too_large": "the value is larger than MAX_EVENT_BYTES; its dead letter holds the beginning",
    "not_json": "the value is not JSON",
    "invalid_event": "a field is missing, has a wrong type or is out of bounds",
    "unsupported_version": "`v` is newer than this worker knows",
    "unknown_stream": "no contract for the stream",
    "invalid_id": "prediction_id (or entity) is missing, too long, or not the record's key",
    "time_out_of_range": "the event's time is before 1990 or ahead of the broker's clock by more than max_ahead",
    "invalid_inputs": "inputs break the contract",
    "invalid_output": "output breaks the contract",
    "invalid_values": "outcome values break the contract",
    "conflicting_prediction": "a second prediction with the same id and other content; the first counts",
    "late": "an outcome observed after the horizon, in a stream whose contract refuses those",
    "too_old": "a prediction so late that its id may have been forgotten, or its outcome given to another",
    "orphan": "an outcome whose prediction never came",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_EARLIEST_US = (datetime(1990, 1, 1, tzinfo=UTC) - _EPOCH) // _MICROSECOND

Time = Annotated[datetime, msgspec.Meta(tz=True)]
Object = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
# msgspec reads `Raw | None` as null only: an absent object is therefore JSON's null, kept raw like the rest.
ObjectOrNull = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": ["object", "null"]})]
NULL = msgspec.Raw(b"null")


class Prediction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a model said. `model` is `name@version`; `output` is `{"label", "probabilities"}`.

    `entity`: in streams that are joined by a business key, the loan or account it was made for, and the record's key.
    """

    v: int = VERSION
    prediction_id: str
    stream: str
    model: str
    predicted_at: Time
    inputs: Object
    output: Object
    entity: str | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What happened. A later one with other values for the same prediction is a revision.

    It names the prediction or, in streams that are joined by a business key, the `entity`: one of the two.
    """

    v: int = VERSION
    prediction_id: str | None = None
    entity: str | None = None
    stream: str
    observed_at: Time
    values: Object
    source: str = "outcome"


class Tick(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Event time of the stream `tick` has come to `at` in this partition, though no event says so: it is silent.

    A join worker writes it among the predictions, so that the passing of time is in the log: whoever reads the log
    again, or later, or elsewhere, sees the same time pass between the same events (docs/decisions/0010).
    """

    v: int = VERSION
    tick: str
    at: Time


class Distribution(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """A model's output: the probability of each class, and the likeliest.

    `task` is the contract's, where classes stand by themselves: of `multilabel`, `label` names those of probability
    1/2 and above, joined by commas; of `score`, whose one class is `score`, it is that number; of `text` it is what was
    written, whose probability alone is listed.
    """

    task: Literal["classification", "multilabel", "score", "text"] = "classification"
    label: str
    probabilities: dict[str, Annotated[float, msgspec.Meta(ge=0, le=1)]]


class GroundTruth(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A labeled (or expired) prediction: what the join says of it once its label is known, and again at each revision.

    `status` is `labeled` (an outcome came) or `expired` (the horizon passed; `label` is then what the contract says,
    null if censored). `revision` is the number of distinct outcomes that count, and 0 for an expired one: it rises, and
    the row with the highest revision is the current one. It depends on the set of events only, not on their order.
    An expired one has no outcome: `observed_at` and `source` are None, `values` is NULL. `entity` is the prediction's.
    """

    v: int = VERSION
    prediction_id: str
    stream: str
    revision: int
    status: Literal["labeled", "expired"]
    label: str | None
    model: str
    predicted_at: Time
    observed_at: Time | None
    inputs: Object
    output: Object
    values: ObjectOrNull
    source: str | None
    entity: str | None = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An event that breaks its contract, kept whole: `key` and `value` are the original bytes (base64 on the wire).

    Of one that is `too_large`, `value` is the first `MAX_EVENT_BYTES`; the rest is still at its topic and offset.
    """

    v: int = VERSION
    reason: str
    detail: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    stream: str | None = None
    prediction_id: str | None = None


Event = TypeVar("Event", Prediction, Outcome)

encode = msgspec.json.Encoder().encode
_decode_prediction = msgspec.json.Decoder(Prediction).decode
_decode_outcome = msgspec.json.Decoder(Outcome).decode
_decode_tick = msgspec.json.Decoder(Tick).decode
_decode_distribution = msgspec.json.Decoder(Distribution).decode
decode_ground_truth = msgspec.json.Decoder(GroundTruth).decode
decode_dead_letter = msgspec.json.Decoder(DeadLetter).decode


def new_prediction_id() -> str:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random; ids of one process sort by time of making."""
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def microseconds(moment: datetime) -> int:
    """Event time as whole microseconds since 1970-01-01 UTC."""
    return (moment - _EPOCH) // _MICROSECOND


def instant(us: int) -> datetime:
    """The moment that many microseconds after 1970-01-01 UTC: the inverse of `microseconds`."""
    return _EPOCH + us * _MICROSECOND


def encode_ground_truth(
    *,
    prediction_id: str,
    stream: str,
    revision: int,
    status: Literal["labeled", "expired"],
    label: str | None,
    model: str,
    predicted_at: int,
    observed_at: int | None,
    inputs: bytes,
    output: bytes,
    values: bytes,
    source: str | None,
    entity: str | None,
) -> bytes:
    """A `GroundTruth` on the wire, of times in microseconds and payloads that are JSON; quicker than by making one."""
    return _GROUND_TRUTH % (
        VERSION,
        encode(prediction_id),
        _encode_word(stream),
        revision,
        _encode_word(status),
        _encode_word(label),
        _encode_word(model),
        encode(instant(predicted_at)),
        b"null" if observed_at is None else encode(instant(observed_at)),
        inputs,
        output,
        values,
        _encode_word(source),
        b"null" if entity is None else encode(entity),
    )


_GROUND_TRUTH = (
    b'{"v":%d,"prediction_id":%b,"stream":%b,"revision":%d,"status":%b,"label":%b,"model":%b,"predicted_at":%b,'
    b'"observed_at":%b,"inputs":%b,"output":%b,"values":%b,"source":%b,"entity":%b}'
)
_encode_word = lru_cache(1_000)(encode)  # of a text of which there are few different ones: a name, a label


def read_prediction(
    value: bytes | None, key: bytes | None, timestamp_ms: int, contracts: Mapping[str, Contract]
) -> Prediction | Tick:
    """Decode and check one record of the predictions topic.

    `timestamp_ms` is the record's broker time (LogAppendTime): the bound for event times, the same in every replay.
    Raises Rejected with the reason; nothing else, whatever the bytes.
    """
    return timed_prediction(value, key, timestamp_ms, contracts)[0]


def read_outcome(
    value: bytes | None, key: bytes | None, timestamp_ms: int, contracts: Mapping[str, Contract]
) -> Outcome:
    """Decode and check one record of the outcomes topic. Raises Rejected, like `read_prediction`."""
    return timed_outcome(value, key, timestamp_ms, contracts)[0]


def timed_prediction(
    value: bytes | None, key: bytes | None, timestamp_ms: int, contracts: Mapping[str, Contract]
) -> tuple[Prediction | Tick, int]:
    """`read_prediction`, with the event's time in microseconds."""
    try:
        event = _read(_decode_prediction, value)
    except Rejected as not_a_prediction:
        tick = _as_tick(value)
        if tick is None:
            raise not_a_prediction from None
        return tick, _in_range(tick.at, "at", timestamp_ms, _contract_of(tick.tick, contracts))
    contract = _contract_of(event.stream, contracts)
    if contract.join is None:
        _check_key(event.prediction_id, "prediction_id", key, event.entity, "entity")
    else:
        check_id(event.prediction_id, "prediction_id")
        _check_key(event.entity, "entity", key)
    at = _in_range(event.predicted_at, "predicted_at", timestamp_ms, contract)
    contract.check_inputs(event.inputs)
    try:
        _decode_distribution(event.output)
    except msgspec.DecodeError as exc:
        raise Rejected("invalid_output", f"output: {exc}") from exc
    return event, at


def timed_outcome(
    value: bytes | None, key: bytes | None, timestamp_ms: int, contracts: Mapping[str, Contract]
) -> tuple[Outcome, int]:
    """`read_outcome`, with the event's time in microseconds."""
    event = _read(_decode_outcome, value)
    contract = _contract_of(event.stream, contracts)
    if contract.join is None:
        _check_key(event.prediction_id, "prediction_id", key, event.entity, "entity")
    else:
        _check_key(event.entity, "entity", key, event.prediction_id, "prediction_id")
    at = _in_range(event.observed_at, "observed_at", timestamp_ms, contract)
    contract.says(bytes(event.values))
    return event, at


def _as_tick(value: bytes | None) -> Tick | None:
    try:
        return _decode_tick(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class _Version(msgspec.Struct):
    v: int = VERSION


_decode_version = msgspec.json.Decoder(_Version).decode


def _read(decode: Callable[[bytes], Event], value: bytes | None) -> Event:
    if value is None:
        raise Rejected("not_json", "the record has no value")
    if len(value) > MAX_EVENT_BYTES:
        raise Rejected("too_large", f"the value has {len(value)} bytes; at most {MAX_EVENT_BYTES} are allowed")
    try:
        if not value.isascii():
            value.decode()  # JSON is UTF-8 throughout (RFC 8259); msgspec checks only the texts it reads
        event = decode(value)
    except msgspec.ValidationError as exc:
        _refuse_newer(value)
        raise Rejected("invalid_event", str(exc)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Rejected("not_json", str(exc)) from exc
    if event.v != VERSION:
        raise Rejected("unsupported_version", f"v is {event.v}; this worker reads v {VERSION}")
    return event


def _refuse_newer(value: bytes) -> None:
    """A newer version may well have other fields: then its version is the reason, not the fields."""
    try:
        version = _decode_version(value).v
    except (msgspec.DecodeError, RecursionError):
        return
    if version > VERSION:
        raise Rejected("unsupported_version", f"v is {version}; this worker reads v {VERSION}")


def _contract_of(stream: str, contracts: Mapping[str, Contract]) -> Contract:
    contract = contracts.get(stream)
    if contract is None:
        raise Rejected(
            "unknown_stream", f"stream '{stream[:80]}' has no contract; known: {', '.join(sorted(contracts))}"
        )
    return contract


def check_id(text: str, field: str) -> None:
    """Raises Rejected("invalid_id") for the id of a prediction or an entity that is empty or too long."""
    if not 1 <= len(text) <= MAX_ID_LENGTH:
        raise Rejected("invalid_id", f"{field} has {len(text)} characters; 1 to {MAX_ID_LENGTH} are allowed")


def _check_key(
    text: str | None, field: str, key: bytes | None, other: str | None = None, other_field: str = ""
) -> None:
    """The field that the stream is joined by must be there and be the record's key; the `other` must not be there."""
    if text is None:
        raise Rejected("invalid_id", f"{field} is missing: the contract's stream is joined by it")
    check_id(text, field)
    if key != text.encode():
        raise Rejected("invalid_id", f"the record's key is not its {field}; key every record by it")
    if other is not None:
        raise Rejected(
            "invalid_id", f"{other_field} is given: the contract's stream is joined by {field}, and not by it"
        )


def _in_range(moment: datetime, field: str, timestamp_ms: int, contract: Contract) -> int:
    """The moment in microseconds. Raises Rejected where it is out of range."""
    at = (moment - _EPOCH) // _MICROSECOND
    if not _EARLIEST_US <= at <= timestamp_ms * 1000 + contract.max_ahead_us:
        raise Rejected(
            "time_out_of_range",
            f"{field} is {moment.isoformat()}; allowed: 1990 to {contract.max_ahead} after arrival",
        )
    return at
