"""The audit: it balances on a right lake, and finds each fault that is planted in one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from accrual.config import Config
from accrual.errors import LakeError
from accrual.lake import WritableLake, open_lake_for_writing
from accrual.lake_tables import TABLES
from accrual.lake_verify import record
from consumers.audit import Audit, audit, audit_when_settled
from consumers.recompute import Scope
from consumers.windows import Sealer
from tests.consumers.conftest import START, STREAM, World, settings

FullLake = Callable[[int], WritableLake]

ONE_LABELED = "(select min(prediction_id) from ground_truth_history where status = 'labeled')"
ONE_EXPIRED = "(select min(prediction_id) from ground_truth_history where status = 'expired')"
ONE_REVISED = "(select min(prediction_id) from ground_truth_history where revision = 2)"
ONE_PREDICTION = "(select min(prediction_id) from predictions)"


class Undone(Exception):
    """Takes a planted fault back."""


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, WritableLake]]:
    """A lake whose books balance, for many faults."""
    world = World(settings(tmp_path_factory.mktemp("right"), "right"))
    world.minutes(0, 200)
    world.let_time_pass()
    with open_lake_for_writing(world.config) as lake:
        world.pour(lake)
        assert books(world, lake).balanced
        yield world, lake


def books(world: World, lake: WritableLake, scope: Scope | None = None) -> Audit:
    return audit(lake, world.contracts, world.names, scope or Scope())


def test_the_books_of_a_right_lake_balance(world: World, full_lake: FullLake) -> None:
    found = books(world, full_lake(2000))
    assert found.differences == []
    assert found.balanced
    counts = {name: sum(getattr(b, name) for b in found.balances) for name in ("labeled", "expired", "pending")}
    assert counts["pending"] == 0
    assert counts["labeled"] + counts["expired"] == 2002
    assert sum(b.dead_lettered for b in found.balances) > 100
    assert sum(b.duplicate for b in found.balances) > 100
    assert sum(o.late for o in found.outcomes) > 50


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (f"delete from ground_truth_history where prediction_id = {ONE_LABELED}", "missing"),
        (f"delete from ground_truth_history where prediction_id = {ONE_REVISED} and revision = 2", "revision"),
        (f"delete from ground_truth_history where prediction_id = {ONE_EXPIRED}", "not expired"),
        (
            f"insert into ground_truth_history from ground_truth_history where prediction_id = {ONE_LABELED}",
            "double row",
        ),
        (f"update ground_truth_history set label = 'urgent' where prediction_id = {ONE_LABELED}", "label"),
        (f"update ground_truth_history set revision = 7 where prediction_id = {ONE_LABELED}", "revision"),
        (f"update ground_truth_history set source = 'nobody' where prediction_id = {ONE_LABELED}", "outcome"),
        (f"update ground_truth_history set model = 'm@9' where prediction_id = {ONE_LABELED}", "prediction"),
        (f"update ground_truth_history set label = 'high' where prediction_id = {ONE_EXPIRED}", "expired label"),
        (f"update ground_truth_history set prediction_id = 'x' where prediction_id = {ONE_LABELED}", "not predicted"),
        (f"delete from predictions where prediction_id = {ONE_PREDICTION}", "gap"),
        (f"insert into predictions from predictions where prediction_id = {ONE_PREDICTION}", "twice"),
        (f"delete from outcomes where prediction_id = {ONE_REVISED}", "gap"),
        ("delete from dead_letters where reason = 'not_json'", "gap"),
        ("delete from dead_letters where reason = 'late'", "no dead letter"),
        ("delete from dead_letters where reason = 'conflicting_prediction'", "no dead letter"),
        ("update dead_letters set reason = 'too_old' where reason = 'conflicting_prediction'", "wrong dead letter"),
        ("insert into dead_letters from dead_letters where reason = 'late'", "dead letter twice"),
        ("insert into dead_letters from dead_letters where reason = 'not_json'", "twice"),
        ("update moves set next_offset = next_offset + 3 where topic like '%.predictions'", "gap"),
        ('update outcomes set "values" = \'{"urgency":"high"}\' where "values" like \'%low%\'', "label"),
    ],
)
def test_each_planted_fault_is_found(right: tuple[World, WritableLake], fault: str, kind: str) -> None:
    world, lake = right
    with pytest.raises(Undone), lake.transaction():
        lake.rows(fault)
        found = books(world, lake)
        assert not found.balanced
        assert kind in {difference.kind for difference in found.differences}
        raise Undone
    assert books(world, lake).balanced


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter(path: Path) -> None:
    """One bit in the middle, which Parquet itself may not see."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "kind"), [(cut, "file truncated"), (alter, "file altered"), (Path.unlink, "file missing")]
)
def test_a_damaged_file_is_found(
    config: Config, world: World, full_lake: FullLake, damage: Callable[[Path], None], kind: str
) -> None:
    lake = full_lake(100)
    record(lake, config)
    assert audit_when_settled(config, world.contracts, Scope()).balanced
    files = sorted((config.state_dir / "lake" / "data").rglob("ground_truth_history/**/*.parquet"))
    damage(files[0])
    found = audit_when_settled(config, world.contracts, Scope())
    assert not found.balanced
    assert [(d.kind, d.id.rpartition("/")[2]) for d in found.differences] == [(kind, files[0].name)]


def test_an_expiry_before_the_horizon_is_found(world: World, lake: WritableLake) -> None:
    p = world.prediction(0)
    world.send(p)
    world.send(world.ground_truth(p, None))
    world.pour(lake)
    assert [d.kind for d in books(world, lake).differences] == ["expired early"]


def test_pending_predictions_and_waiting_outcomes_balance(world: World, lake: WritableLake) -> None:
    world.send(world.prediction(0))
    world.send(world.outcome(world.prediction(1)))
    world.pour(lake)
    found = books(world, lake)
    assert found.balanced
    assert [(b.captured, b.pending) for b in found.balances] == [(1, 1)]
    assert [(o.captured, o.waiting) for o in found.outcomes] == [(1, 1)]


def test_of_a_key_that_is_there_twice_the_last_value_is_the_label(world: World, lake: WritableLake) -> None:
    p = world.prediction(0)
    o = world.outcome(p)
    twice = b'{"urgency":"low","\\u0075rgency":"high"}'
    world.send(p)
    world.send_raw(
        world.names.outcomes,
        f'{{"prediction_id":"{p.prediction_id}","stream":"{STREAM}",'
        f'"observed_at":"{o.observed_at.isoformat()}","values":{twice.decode()}}}'.encode(),
        p.prediction_id.encode(),
    )
    world.pour(lake)
    label = world.contracts[STREAM].label_of(world.contracts[STREAM].decode_values(twice))
    assert [d.kind for d in books(world, lake).differences] == ["missing"]
    assert lake.rows("select label from expected") == [{"label": label}]


def test_what_was_refused_under_an_older_contract_stays_a_dead_letter(world: World, lake: WritableLake) -> None:
    p, o = world.prediction(0), world.outcome(world.prediction(0), urgency="high")
    world.refuse(world.send(p), "unknown_stream")  # read as rows: the sink has the contract by now
    world.refuse(world.send(o), "invalid_values")
    world.pour(lake)
    found = books(world, lake)
    assert found.balanced
    assert [(b.captured, b.dead_lettered) for b in found.balances if b.stream == ""] == [(1, 1)]
    for event in (p, o, world.ground_truth(p, o)):  # replayed
        world.send(event)
    world.pour(lake)
    found = books(world, lake)
    assert found.differences == []
    assert found.balanced
    assert [(b.captured, b.labeled) for b in found.balances if b.stream == STREAM] == [(1, 1)]
    lake.rows("update dead_letters set reason = 'not_json'")  # of bytes that are valid JSON
    assert "twice" in {difference.kind for difference in books(world, lake).differences}


def test_a_day_is_audited_alone(world: World, full_lake: FullLake) -> None:
    lake = full_lake(3000)
    day = Scope(STREAM, START + timedelta(days=1), START + timedelta(days=2))
    found = books(world, lake, day)
    assert found.balanced
    assert sum(b.labeled + b.expired for b in found.balances if b.day == (START + timedelta(days=1)).date()) == 1440
    lake.rows("update ground_truth_history set label = 'urgent' where day = '2025-01-01' and status = 'labeled'")
    assert books(world, lake, day).balanced
    assert not books(world, lake).balanced


def test_only_what_came_after_a_snapshot_is_audited(world: World, lake: WritableLake) -> None:
    world.minutes(0, 100)
    world.pour(lake)
    before = lake.snapshot_id()
    p = world.prediction(20)
    world.minutes(100, 100)
    world.send(world.outcome(p, timedelta(hours=20), "high"))  # an old prediction of which something came
    world.let_time_pass()
    world.pour(lake)
    everything, later = books(world, lake), books(world, lake, Scope(changed_since=before))
    assert [d.id for d in everything.differences] == [d.id for d in later.differences] == ["p-000020"]
    counted = [sum(b.captured for b in found.balances) for found in (everything, later)]
    assert counted[1] < counted[0]
    assert sum(b.labeled + b.expired for b in later.balances) == 103
    for one, where in (("p-000010", everything), ("p-000150", later)):
        lake.rows(f"update ground_truth_history set model = 'm@9' where prediction_id = '{one}'")
        assert one not in {d.id for d in where.differences}
    assert {d.id for d in books(world, lake, Scope(changed_since=before)).differences} == {"p-000020", "p-000150"}
    assert {d.id for d in books(world, lake).differences} == {"p-000010", "p-000020", "p-000150"}
    with pytest.raises(LakeError, match=r"no snapshot|at version"):
        books(world, lake, Scope(changed_since=99_999))


def run(config: Config, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consumers", *arguments]
    env = {**os.environ, **config.environment(), "COLUMNS": "160"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_record_is_signed_and_an_altered_one_is_not_believed(config: Config, full_lake: FullLake) -> None:
    full_lake(100)
    assert run(config, "audit", "--no-record").returncode == 0
    assert not (config.state_dir / "audits").exists()
    done = run(config, "audit", "--stream", STREAM)
    [record] = (config.state_dir / "audits").glob("*.json")
    assert str(record) in done.stdout.replace("\n", "")
    verified = run(config, "audit", "--verify", str(record))
    assert verified.returncode == 0, verified.stderr
    assert "The books balance" in verified.stdout
    record.write_text(record.read_text().replace('"pending": 0', '"pending": 1'))
    refused = run(config, "audit", "--verify", str(record))
    assert refused.returncode == 1
    assert "either it was altered" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_prediction_is_explained(config: Config, world: World, lake: WritableLake) -> None:
    p = world.prediction(7)
    world.minutes(0, 100)
    world.refuse(world.send(world.prediction(7, "\x1b[31mred")), "conflicting_prediction")
    world.let_time_pass()
    world.pour(lake)
    done = run(config, "audit", "--explain", p.prediction_id)
    assert done.returncode == 0, done.stderr
    told = done.stdout
    for word in ("prediction", "outcome", "ground truth", "revision 1", "in no sealed window yet"):
        assert word in told
    assert "\x1b[31m" not in told
    sealer = Sealer(lake, world.contracts, world.names)
    assert sealer.seal(world.guard(lake))
    generation = {"stream": STREAM, "version": 1, "model": f"{STREAM}@1", "windows": [1], "offset": 0}
    lake.append({"generations": pa.Table.from_pylist([generation], TABLES["generations"])})
    told = " ".join(run(config, "audit", "--explain", p.prediction_id).stdout.split())
    assert f"sealed in window 1 of {STREAM}" in told
    assert f"trained on it: {STREAM}@1" in told
    unknown = run(config, "audit", "--explain", "nobody")
    assert unknown.returncode == 1
    assert "has nothing with prediction id 'nobody'" in unknown.stderr


def test_the_command_prints_the_ids_and_ends_with_1(config: Config, world: World, full_lake: FullLake) -> None:
    lake = full_lake(100)
    report = config.state_dir / "audit.json"
    done = run(config, "audit", "--json", str(report))
    assert done.returncode == 0, done.stderr
    assert "The books balance" in done.stdout
    lake.rows("update ground_truth_history set label = 'urgent' where prediction_id = 'p-000001'")
    done = run(config, "audit", "--json", str(report))
    assert done.returncode == 1
    assert "p-000001" in done.stdout
    written = json.loads(report.read_text())
    assert not written["balanced"]
    assert [d["id"] for d in written["audit"]["differences"]] == ["p-000001"]
