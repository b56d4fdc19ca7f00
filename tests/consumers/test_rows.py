"""From records to Arrow: what is valid becomes a row, whatever else comes is left out, and nothing raises."""

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.contract import load_contract
from accrual.events import encode
from accrual.kafka import TopicNames
from accrual.lake_tables import TABLES
from accrual.ledger import Bin, Decision, Evaluation, Generation, Run, SliceScores
from consumers.rows import arrow_tables, readers
from tests.consumers.conftest import CONTRACT, STREAM, Record, World

NAMES = TopicNames("t")
AT = datetime(2026, 1, 1, tzinfo=UTC)


def rows(records: list[Record], contracts: Any = None) -> tuple[dict[str, Any], list[Any]]:
    return arrow_tables(records, readers(NAMES, contracts or {}))  # type: ignore[arg-type]


def test_each_kind_of_record_becomes_a_row_of_its_table(world: World) -> None:
    p = world.prediction(3)
    o = world.outcome(p)
    for event in (p, o, world.ground_truth(p, o), world.ground_truth(p, None)):
        world.send(event)
    world.refuse(world.send_raw(world.names.predictions, b"\x00\xff", None), "not_json")
    generation = Generation(
        stream=STREAM,
        version=1,
        model=f"{STREAM}@1",
        digest="d",
        bundle="b",
        run_id="r",
        parent=None,
        windows=[1],
        rows=9,
        published_at=AT,
    )
    run = Run(
        run_id="r",
        stream=STREAM,
        version=1,
        parent="p",
        windows=[1, 2],
        snapshot_id=4,
        rows_new=1,
        rows_replayed=2,
        seed=3,
        digest=None,
        state="waiting",
        reason="",
        seconds=1.5,
        at=AT,
        selection={"new": 1, "replay": 2},
    )
    evaluation = Evaluation(
        stream=STREAM,
        run_id="r",
        window=2,
        model="m",
        role="champion",
        rows=5,
        accuracy=0.5,
        auroc=None,
        brier=0.1,
        log_loss=0.2,
        ece=0.3,
        coverage=1.0,
        intervals={"brier": (0.05, 0.15)},
        reliability=[Bin(said=0.2, happened=0.4, rows=5)],
        slices=[SliceScores("grade=C", 5, 0.5, 0.1, 0.03)],
        at=AT,
    )
    world.send_raw(world.names.models, encode(generation), STREAM.encode())
    decision = Decision(
        stream=STREAM,
        window=1,
        prediction_id="p",
        revision=1,
        rule="r",
        detail="",
        state="released",
        by="me",
        note="",
        at=AT,
    )
    for entry in (run, evaluation, decision):
        world.send_raw(world.names.training, encode(entry), None)
    by_topic = readers(world.names, world.contracts)
    tables, skipped = arrow_tables(world.records, by_topic)  # type: ignore[arg-type]
    assert {name: len(table) for name, table in tables.items()} == {
        "predictions": 1,
        "outcomes": 1,
        "ground_truth_history": 2,
        "dead_letters": 1,
        "generations": 1,
        "runs": 1,
        "evaluations": 1,
        "quarantine": 1,
    }
    assert all(table.schema == TABLES[name] for name, table in tables.items())
    assert [(s.reason, s.own) for s in skipped] == [("not_json", False)]
    [row] = tables["predictions"].to_pylist()
    assert row["inputs"] == bytes(p.inputs).decode()
    assert (row["predicted_at"], row["day"]) == (p.predicted_at, p.predicted_at.date())
    assert [r["values"] for r in tables["ground_truth_history"].to_pylist()] == [bytes(o.values).decode(), None]
    assert tables["dead_letters"].to_pylist()[0]["value"] == b"\x00\xff"
    assert tables["runs"].to_pylist()[0]["windows"] == [1, 2]
    assert tables["runs"].to_pylist()[0]["selection"] == [("new", 1), ("replay", 2)]
    [judged] = tables["evaluations"].to_pylist()
    assert [json.loads(judged[name]) for name in ("intervals", "reliability", "slices")] == [
        {"brier": [0.05, 0.15]},
        [{"said": 0.2, "happened": 0.4, "rows": 5}],
        [{"name": "grade=C", "rows": 5, "accuracy": 0.5, "brier": 0.1, "loss_at_most": 0.03}],
    ]


def test_a_ledger_of_before_is_read(world: World) -> None:
    """Entries that earlier versions wrote have none of the later fields."""
    old = b'{"type":"evaluation","v":1,"stream":"s","run_id":"r","window":2,"model":"s@1","role":"champion","rows":5,'
    old += b'"accuracy":0.5,"auroc":null,"brier":0.1,"log_loss":0.2,"ece":0.3,"coverage":1,"at":"2025-01-01T00:00:00Z"}'
    world.send_raw(world.names.training, old, None)
    tables, skipped = arrow_tables(world.records, readers(world.names, world.contracts))  # type: ignore[arg-type]
    [row] = tables["evaluations"].to_pylist()
    assert (row["intervals"], row["slices"], row["calibration_error"], skipped) == ("{}", "[]", None, [])


def test_a_time_in_another_zone_has_the_day_of_utc(world: World) -> None:
    raw = encode(world.prediction(0)).replace(b"2025-01-01T00:00:00Z", b"2025-01-01T01:30:00+03:00")
    world.send_raw(world.names.predictions, raw, b"p-000000")
    tables, _ = arrow_tables(world.records, readers(world.names, world.contracts))  # type: ignore[arg-type]
    [row] = tables["predictions"].to_pylist()
    assert str(row["day"]) == "2024-12-31"
    assert row["predicted_at"] == datetime(2024, 12, 31, 22, 30, tzinfo=UTC)


def test_a_value_no_column_can_hold_costs_only_its_own_row(world: World) -> None:
    p = world.prediction(0)
    for n in range(100):
        row = world.ground_truth(world.prediction(n), world.outcome(p))
        world.send(msgspec.structs.replace(row, revision=2**40) if n == 37 else row)
    tables, skipped = arrow_tables(world.records, readers(world.names, world.contracts))  # type: ignore[arg-type]
    assert len(tables["ground_truth_history"]) == 99
    assert [(s.topic, s.reason, s.own) for s in skipped] == [(world.names.ground_truth, "unreadable", True)]


@pytest.mark.parametrize("topic", [*readers(NAMES, {})])
@given(value=st.none() | st.binary(max_size=200), key=st.none() | st.binary(max_size=20))
def test_no_bytes_stop_the_sink(topic: str, value: bytes | None, key: bytes | None) -> None:
    tables, skipped = rows([Record(topic, 0, 0, key, value, 0)])
    assert sum(map(len, tables.values())) + len(skipped) == 1


@given(
    event=st.fixed_dictionaries(
        {
            "prediction_id": st.text(max_size=10),
            "stream": st.sampled_from([STREAM, "other"]),
            "model": st.text(max_size=10),
            "predicted_at": st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
            "observed_at": st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat),
            "inputs": st.dictionaries(st.text(max_size=5), st.text(max_size=20)) | st.just({"text": "?"}),
            "output": st.just({"label": "low", "probabilities": {"low": 1}}) | st.text(max_size=5),
            "values": st.sampled_from([{"urgency": "low"}, {"urgency": 3}, {}, None]),
            "revision": st.integers(-(2**70), 2**70),
            "status": st.sampled_from(["labeled", "expired", "?"]),
            "label": st.none() | st.text(max_size=5),
            "source": st.text(max_size=5),
        }
    ),
    topic=st.sampled_from([NAMES.predictions, NAMES.outcomes, NAMES.ground_truth]),
)
def test_no_event_stops_the_sink(event: dict[str, Any], topic: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    key = event["prediction_id"].encode()
    record = Record(topic, 0, 0, key, msgspec.json.encode(event), 1_764_000_000_000)
    tables, skipped = rows([record], _contracts(tmp_path_factory))
    assert sum(map(len, tables.values())) + len(skipped) == 1


def _contracts(factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not _CACHE:
        path = factory.mktemp("contract") / "tickets.yaml"
        path.write_text(CONTRACT)
        _CACHE[STREAM] = load_contract(path)
    return _CACHE


_CACHE: dict[str, Any] = {}
