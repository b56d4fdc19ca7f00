"""The oracle on cases worked out by hand: it accepts what is right, and names each thing that is not."""

from __future__ import annotations

import base64
from collections import Counter
from typing import Any

import pytest

from accrual.events import encode
from tests.chaos.oracle import Record, Rules, Verdict, judge
from tests.chaos.story import outcome, prediction

RULES = {
    "strict": Rules(16 * 3600, "dead_letter", "no"),
    "lenient": Rules(16 * 3600, "revise", None),
}
NOW = 1_790_000_000_000
HOMES = dict.fromkeys((b"a", b"b", b"c", b"d", b"e"), 0)


def records(*values: tuple[bytes | None, bytes | None], partition: int = 0, start: int = 0) -> list[Record]:
    return [Record(partition, start + n, NOW, key, value) for n, (key, value) in enumerate(values)]


def row(
    id_: str, revision: int, hour: float | None, answer: str | None, stream: str = "strict", **changes: Any
) -> bytes:
    """A ground-truth row for a prediction at hour 0; `hour` None: expired, with the label `answer`."""
    said = prediction(id_, stream, 0)
    saw = {} if hour is None else {"source": "outcome"} | _document(outcome(id_, stream, hour, str(answer)))
    document = _document(said) | {
        "revision": revision,
        "status": "expired" if hour is None else "labeled",
        "label": answer,
        "observed_at": saw.get("observed_at"),
        "values": saw.get("values"),
        "source": saw.get("source"),
    }
    return encode(document | changes)


def _document(event: bytes) -> dict[str, Any]:
    import json

    return dict(json.loads(event))


def letter(reason: str, topic: str, record: Record) -> bytes:
    shown = [None if part is None else base64.b64encode(part).decode() for part in (record.key, record.value)]
    place = {"topic": f"t.{topic}", "partition": record.partition, "offset": record.offset}
    return encode({"reason": reason, "detail": "", "key": shown[0], "value": shown[1], **place})


PREDICTIONS = records(
    (b"a", prediction("a", "strict", 0)),
    (b"a", prediction("a", "strict", 0)),
    (b"a", prediction("a", "strict", 0, said="no")),
    (b"b", prediction("b", "strict", 0)),
    (b"c", prediction("c", "lenient", 0)),
    (b"k", b"not json"),
)
OUTCOMES = records(
    (b"a", outcome("a", "strict", 3, "no")),
    (b"a", outcome("a", "strict", 2, "yes")),
    (b"a", outcome("a", "strict", 2, "yes")),
    (b"b", outcome("b", "strict", 17, "yes")),
    (b"c", outcome("c", "lenient", 17, "yes")),
    (b"d", outcome("d", "strict", 1)),
    (b"a", outcome("a", "strict", 1, "perhaps")),
)
STRAY = Record(1, 0, NOW, b"e", prediction("e", "lenient", 0))
FORWARDED = Record(0, 99, NOW, b"e", STRAY.value)
ROWS = [
    (b"a", row("a", 1, 3, "no")),
    (b"a", row("a", 2, 3, "no")),
    (b"b", row("b", 0, None, "no")),
    (b"c", row("c", 0, None, None, "lenient")),
    (b"c", row("c", 1, 17, "yes", "lenient")),
    (b"e", row("e", 0, None, None, "lenient")),
]
LETTERS = [
    letter("conflicting_prediction", "predictions", PREDICTIONS[2]),
    letter("not_json", "predictions", PREDICTIONS[5]),
    letter("late", "outcomes", OUTCOMES[3]),
    letter("orphan", "outcomes", OUTCOMES[5]),
    letter("invalid_values", "outcomes", OUTCOMES[6]),
]


def verdict(
    rows: list[tuple[bytes, bytes]] = ROWS,
    letters: list[bytes] = LETTERS,
    predictions: list[Record] = [*PREDICTIONS, STRAY, FORWARDED],  # noqa: B006 - never changed
) -> Verdict:
    topics = {
        "predictions": predictions,
        "outcomes": OUTCOMES,
        "ground_truth": records(*rows),
        "dead_letters": records(*((None, value) for value in letters)),
    }
    return judge(topics, RULES, HOMES, "t")


def test_what_is_right_is_accepted() -> None:
    judged = verdict()
    assert judged.clean, judged.samples
    assert judged.compared == 4 + 5 + 1


def test_a_revision_may_be_skipped_at_the_beginning_only() -> None:
    assert verdict([r for r in ROWS if r[1] != ROWS[0][1] and r[1] != ROWS[3][1]]).clean
    three = [*OUTCOMES, Record(0, 50, NOW, b"a", outcome("a", "strict", 4, "yes"))]
    rows = [*ROWS, (b"a", row("a", 3, 4, "yes"))]
    topics = {
        "predictions": [*PREDICTIONS, STRAY, FORWARDED],
        "outcomes": three,
        "dead_letters": records(*((None, value) for value in LETTERS)),
    }
    assert judge(topics | {"ground_truth": records(*rows)}, RULES, HOMES, "t").clean
    without_the_second = judge(topics | {"ground_truth": records(*rows[:1], *rows[2:])}, RULES, HOMES, "t")
    assert without_the_second.found == {"lost": 1}


@pytest.mark.parametrize("missing", [1, 2, 4, 5])
def test_a_missing_last_row_is_lost(missing: int) -> None:
    assert verdict([*ROWS[:missing], *ROWS[missing + 1 :]]).found == {"lost": 1}


def test_a_row_that_comes_twice_is_a_duplicate_even_when_it_is_an_early_one() -> None:
    assert verdict([*ROWS, ROWS[0]]).found == {"duplicate": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "yes"},
        {"status": "expired"},
        {"model": "toy@9"},
        {"predicted_at": "2026-03-01T00:00:01Z"},
        {"observed_at": "2026-03-01T02:00:00Z"},
        {"inputs": {"x": 2}},
        {"output": {"label": "no"}},
        {"values": {"answer": "yes"}},
        {"source": "survey"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_row_with_other_content_is_wrong(changes: dict[str, Any]) -> None:
    assert verdict([ROWS[0], (b"a", row("a", 2, 3, "no", **changes)), *ROWS[2:]]).found == {"wrong": 1}


def test_rows_of_nobody_and_of_too_high_a_revision_are_wrong() -> None:
    assert verdict([*ROWS, (b"d", row("d", 1, 1, "yes"))]).found == {"wrong": 1}
    assert verdict([*ROWS, (b"b", row("b", 1, 17, "yes"))]).found == {"wrong": 1}


def test_dead_letters_are_compared_as_a_multiset_with_their_records() -> None:
    assert verdict(letters=LETTERS[1:]).found == {"lost": 1}
    assert verdict(letters=[*LETTERS, LETTERS[0]]).found == {"duplicate": 1}
    assert verdict(letters=[*LETTERS, letter("late", "outcomes", OUTCOMES[0])]).found == {"wrong": 1}
    altered = letter("not_json", "predictions", PREDICTIONS[5]._replace(value=b"not  json"))
    assert verdict(letters=[LETTERS[0], altered, *LETTERS[2:]]).found == {"wrong": 1}


def test_a_misrouted_record_must_be_forwarded_once() -> None:
    assert verdict(ROWS[:5], predictions=[*PREDICTIONS, STRAY]).found == {"lost": 1}
    again = FORWARDED._replace(offset=100)
    assert verdict(predictions=[*PREDICTIONS, STRAY, FORWARDED, again]).found == {"duplicate": 1}


def test_each_broken_contract_has_its_reason() -> None:
    poison = {
        "unsupported_version": prediction("p", "strict", 0, v=9),
        "invalid_event": encode({"prediction_id": "p", "stream": "strict"}),
        "unknown_stream": prediction("p", "nowhere", 0),
        "invalid_id": prediction("q", "strict", 0),
        "time_out_of_range": prediction("p", "strict", 0, predicted_at="2099-01-01T00:00:00Z"),
        "invalid_inputs": prediction("p", "strict", 0, inputs={"x": None}),
        "invalid_output": prediction("p", "strict", 0, output={"label": "yes"}),
        "not_json": b'{"prediction_id": "\xff"}',
    }
    sent = [Record(2, n, NOW, b"p", value) for n, value in enumerate(poison.values())]
    letters = [letter(reason, "predictions", record) for reason, record in zip(poison, sent, strict=True)]
    topics: dict[str, list[Record]] = {"predictions": sent, "outcomes": [], "ground_truth": []}
    judged = judge(topics | {"dead_letters": records(*((None, v) for v in letters))}, RULES, {}, "t")
    assert judged.clean, judged.samples
    assert judge(topics | {"dead_letters": []}, RULES, {}, "t").found == Counter(lost=len(poison))


def test_an_outcome_of_an_entity_is_its_latest_predictions() -> None:
    rules = {"loans": Rules(16 * 3600, "count", "no", by_entity=True)}
    said = [prediction(f"p{hour}", "loans", hour, entity="L") for hour in (0, 2, 5)]
    seen = [_document(outcome("?", "loans", hour, answer)) for hour, answer in ((4, "yes"), (3, "no"), (40, "yes"))]
    outcomes = records(*((b"L", encode({**event, "prediction_id": None, "entity": "L"})) for event in seen))
    expired = {"status": "expired", "revision": 0, "label": "no", "observed_at": None, "values": None, "source": None}

    def labeled(revision: int, event: dict[str, Any]) -> dict[str, Any]:
        answer = event["values"]["answer"]
        return {"status": "labeled", "revision": revision, "label": answer, "source": "outcome"} | {
            name: event[name] for name in ("observed_at", "values")
        }

    rows = [_document(said[0]) | expired, _document(said[2]) | expired]
    rows += [_document(said[1]) | labeled(1, seen[1]), _document(said[1]) | labeled(2, seen[0])]
    topics = {
        "predictions": records(*((b"L", value) for value in said)),
        "outcomes": outcomes,
        "dead_letters": records((None, letter("orphan", "outcomes", outcomes[2]))),
    }
    judged = judge(topics | {"ground_truth": records(*((b"L", encode(r)) for r in rows))}, rules, {b"L": 0}, "t")
    assert judged.clean, judged.samples
    other = [*rows, _document(said[0]) | labeled(1, seen[1])]
    found = judge(topics | {"ground_truth": records(*((b"L", encode(r)) for r in other))}, rules, {b"L": 0}, "t").found
    assert found == {"wrong": 1}
