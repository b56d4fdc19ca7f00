"""Events: round trips, and no bytes whatever get past the edge as anything but an event or a rejection."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.contract import Contract, Join, load_contracts
from accrual.errors import Rejected
from accrual.events import (
    NULL,
    REASONS,
    DeadLetter,
    GroundTruth,
    Outcome,
    Prediction,
    decode_dead_letter,
    decode_ground_truth,
    encode,
    encode_ground_truth,
    instant,
    microseconds,
    new_prediction_id,
    read_outcome,
    read_prediction,
)

CONTRACTS = load_contracts(Path(__file__).parents[2] / "schemas" / "contracts")
NOW_MS = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp() * 1000)


def prediction(**changes: Any) -> bytes:
    event = {
        "v": 1,
        "prediction_id": "p-1",
        "stream": "support-intents",
        "model": "support-intents@0",
        "predicted_at": "2026-05-01T12:00:00Z",
        "inputs": {"text": "Where is my card?"},
        "output": {"label": "card_arrival", "probabilities": {"card_arrival": 0.9, "card_linking": 0.1}},
    }
    event.update(changes)
    return json.dumps({name: value for name, value in event.items() if value is not ...}).encode()


def outcome(**changes: Any) -> bytes:
    event = {
        "prediction_id": "p-1",
        "stream": "support-intents",
        "observed_at": "2026-05-02T12:00:00Z",
        "values": {"intent": "card_arrival"},
    }
    event.update(changes)
    return json.dumps({name: value for name, value in event.items() if value is not ...}).encode()


def test_good_events_are_read() -> None:
    event = read_prediction(prediction(extra="rides along"), b"p-1", NOW_MS, CONTRACTS)
    assert event.predicted_at == datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert read_outcome(outcome(), b"p-1", NOW_MS, CONTRACTS).source == "outcome"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "not_json"),
        (b"", "not_json"),
        (b"\xff\xfe", "not_json"),
        (prediction().replace(b"my card", b"my \xff card"), "not_json"),
        (prediction(extra="?").replace(b"?", b"\xff"), "not_json"),
        (prediction()[:-5], "not_json"),
        (b"[" * 100_000, "invalid_event"),
        (prediction().replace(b'"2026-05-01T12:00:00Z"', b"NaN"), "not_json"),
        (prediction(model=...), "invalid_event"),
        (prediction(model=7), "invalid_event"),
        (prediction(predicted_at="2026-05-01T12:00:00"), "invalid_event"),
        (prediction(predicted_at="NaN"), "invalid_event"),
        (prediction(predicted_at="2099-01-01T00:00:00Z"), "time_out_of_range"),
        (prediction(predicted_at="1889-01-01T00:00:00Z"), "time_out_of_range"),
        (prediction(stream="nobody-knows"), "unknown_stream"),
        (prediction(prediction_id="p" * 129), "invalid_id"),
        (prediction(prediction_id=""), "invalid_id"),
        (prediction(prediction_id="p-2"), "invalid_id"),
        (prediction(inputs={}), "invalid_inputs"),
        (prediction(output={"label": "a", "probabilities": {"a": 1.5}}), "invalid_output"),
        (prediction(v=2), "unsupported_version"),
        (b'{"v": 2, "all": "else differs"}', "unsupported_version"),
    ],
)
def test_bad_predictions_are_rejected_with_the_reason(value: bytes | None, reason: str) -> None:
    key = b"p" * 129 if value and b"p" * 129 in value else b"p-1"
    with pytest.raises(Rejected) as error:
        read_prediction(value, key, NOW_MS, CONTRACTS)
    assert error.value.reason == reason
    assert reason in REASONS


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (outcome(values=...), "invalid_event"),
        (outcome(values={}), "invalid_values"),
        (outcome(values={"intent": 5}), "invalid_values"),
        (outcome(observed_at="2099-01-01T00:00:00Z"), "time_out_of_range"),
    ],
)
def test_bad_outcomes_are_rejected_with_the_reason(value: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as error:
        read_outcome(value, b"p-1", NOW_MS, CONTRACTS)
    assert error.value.reason == reason


@given(
    st.binary(max_size=300)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    ).map(lambda x: json.dumps(x).encode())
)
def test_no_bytes_raise_anything_but_rejected(value: bytes) -> None:
    for read in (read_prediction, read_outcome):
        with pytest.raises(Rejected):
            read(value, b"p-1", NOW_MS, CONTRACTS)


@given(
    st.sampled_from(["prediction_id", "stream", "model", "predicted_at", "inputs", "output", "v"]),
    st.none() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
)
def test_one_field_of_any_value_is_read_or_rejected(field: str, value: Any) -> None:
    try:
        event = read_prediction(prediction(**{field: value}), b"p-1", NOW_MS, CONTRACTS)
    except Rejected as rejected:
        assert rejected.reason in REASONS
    else:
        assert encode(event)


def test_round_trips_keep_what_was_sent() -> None:
    sent = read_prediction(prediction(), b"p-1", NOW_MS, CONTRACTS)
    assert msgspec.json.decode(encode(sent), type=Prediction) == sent
    answered = read_outcome(outcome(), b"p-1", NOW_MS, CONTRACTS)
    assert msgspec.json.decode(encode(answered), type=Outcome) == answered


@given(st.none() | st.binary(), st.none() | st.binary())
def test_a_dead_letter_keeps_the_original_bytes(key: bytes | None, value: bytes | None) -> None:
    letter = DeadLetter(reason="not_json", detail="", topic="t", partition=1, offset=2, key=key, value=value)
    assert decode_dead_letter(encode(letter)) == letter


def test_prediction_ids_are_uuid7_in_order_of_making() -> None:
    import uuid

    ids = [new_prediction_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    for text in ids:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert parsed.version == 7
        assert parsed.variant == uuid.RFC_4122
    milliseconds = [int(text.replace("-", "")[:12], 16) for text in ids]
    assert milliseconds == sorted(milliseconds)


@given(st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2100, 1, 1)))  # noqa: DTZ001 - made aware below
def test_microseconds_are_exact(moment: datetime) -> None:
    aware = moment.replace(tzinfo=UTC)
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds(aware)) == aware


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
moments = st.integers(microseconds(datetime(1990, 1, 1, tzinfo=UTC)), microseconds(datetime(2100, 1, 1, tzinfo=UTC)))
payloads = st.dictionaries(texts, texts, max_size=2).map(encode)


rows = st.fixed_dictionaries(
    {
        **dict.fromkeys(("prediction_id", "stream", "model"), texts),
        **dict.fromkeys(("label", "source", "entity"), st.none() | texts),
        **dict.fromkeys(("inputs", "output"), payloads),
        "revision": st.integers(0, 9),
        "status": st.sampled_from(["labeled", "expired"]),
        "predicted_at": moments,
        "observed_at": st.none() | moments,
        "values": payloads | st.just(b"null"),
    }
)


@given(rows)
def test_ground_truth_of_parts_is_to_the_byte_what_it_is_as_a_whole(fields: dict[str, Any]) -> None:
    times = {name: us if us is None else instant(us) for name, us in fields.items() if name.endswith("_at")}
    raw = {name: msgspec.Raw(fields[name]) for name in ("inputs", "output", "values")}
    assert encode_ground_truth(**fields) == encode(GroundTruth(**(fields | times | raw)))


@pytest.mark.parametrize("values", [NULL, msgspec.Raw(b'{"intent":"card_arrival"}')])
def test_ground_truth_survives_the_wire_with_and_without_an_outcome(values: msgspec.Raw) -> None:
    row = GroundTruth(
        prediction_id="p-1",
        stream="support-intents",
        revision=1,
        status="labeled",
        label="card_arrival",
        model="support-intents@0",
        predicted_at=datetime(2026, 5, 1, tzinfo=UTC),
        observed_at=None,
        inputs=msgspec.Raw(b'{"text":"?"}'),
        output=msgspec.Raw(b"{}"),
        values=values,
        source=None,
    )
    assert decode_ground_truth(encode(row)) == row


BY_LOAN = {
    name: msgspec.structs.replace(contract, join=Join(by="loan_id"), late="count")
    for name, contract in CONTRACTS.items()
    if name == "support-intents"
}


def test_a_stream_joined_by_a_business_key_has_it_as_the_key_of_its_records() -> None:
    event = read_prediction(prediction(entity="L-1"), b"L-1", NOW_MS, BY_LOAN)
    assert isinstance(event, Prediction) and (event.entity, event.prediction_id) == ("L-1", "p-1")
    known = read_outcome(outcome(prediction_id=..., entity="L-1"), b"L-1", NOW_MS, BY_LOAN)
    assert (known.entity, known.prediction_id) == ("L-1", None)


@pytest.mark.parametrize(
    ("read", "value", "key", "contracts", "detail"),
    [
        (read_prediction, prediction(), b"p-1", BY_LOAN, "entity is missing"),
        (read_prediction, prediction(entity="L-1"), b"p-1", BY_LOAN, "not its entity"),
        (read_prediction, prediction(entity="L" * 129), b"L" * 129, BY_LOAN, "entity has 129 characters"),
        (
            read_prediction,
            prediction(entity="L-1", prediction_id=""),
            b"L-1",
            BY_LOAN,
            "prediction_id has 0 characters",
        ),
        (read_prediction, prediction(entity="L-1"), b"p-1", CONTRACTS, "entity is given"),
        (read_outcome, outcome(entity="L-1"), b"L-1", BY_LOAN, "prediction_id is given"),
        (read_outcome, outcome(prediction_id=...), b"p-1", CONTRACTS, "prediction_id is missing"),
        (read_outcome, outcome(entity="L-1"), b"p-1", CONTRACTS, "entity is given"),
    ],
)
def test_what_a_stream_is_joined_by_must_be_there_and_alone(
    read: Any, value: bytes, key: bytes, contracts: dict[str, Contract], detail: str
) -> None:
    with pytest.raises(Rejected, match=detail) as refused:
        read(value, key, NOW_MS, contracts)
    assert refused.value.reason == "invalid_id"
