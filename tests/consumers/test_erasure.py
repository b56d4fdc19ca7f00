"""An erasure leaves nothing of its subject anywhere in the lake, everything of all others, and books that balance."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from accrual.cli import app
from accrual.config import Config, Lake, Pii, Topics
from accrual.contract import Field
from accrual.erasure import Found, compact_catalog, digest_of, erase, find, subject_of
from accrual.erasure_proof import prove
from accrual.errors import LakeError
from accrual.events import encode
from accrual.kafka import TopicNames
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_maintenance import maintain
from accrual.lake_tables import TABLES
from accrual.pii import pseudonym_of
from consumers.audit import audit
from consumers.recall import touched_windows
from consumers.recompute import Scope
from consumers.windows import Sealer
from tests.consumers.conftest import START, STREAM, World, settings
from tests.consumers.test_entities import NAMES, played, poured
from tests.streams.test_entity import contract

KEY = "a key that nobody knows"
ALICE = "alice-liddell-1852"
AT_ONCE = timedelta(0)


@pytest.fixture
def config(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> Config:
    """A lake with a SQLite catalog, or of the kind that the test names."""
    kind = getattr(request, "param", "sqlite")
    made = msgspec.structs.replace(settings(tmp_path, prefix), pii=Pii(KEY))
    if kind == "production":
        catalog, (address, bucket) = request.getfixturevalue("postgres_catalog"), request.getfixturevalue("s3_bucket")
        lake = Lake(catalog=catalog, data=f"s3://{bucket}/lake", s3_endpoint=address, s3_use_ssl=False)
        return msgspec.structs.replace(made, lake=lake)
    return msgspec.structs.replace(made, lake=Lake(encrypted=kind == "encrypted"))


@pytest.fixture
def world(config: Config) -> World:
    """Two days with a window sealed; among them Alice, whose events are of every kind."""
    world = World(config)
    with open_lake_for_writing(config) as lake:
        world.minutes(0, 55)
        alice(world, 40)
        world.pour(lake)
        world.minutes(55, 20)
        world.let_time_pass()
        world.pour(lake)
        while Sealer(lake, world.contracts, world.names).seal(world.guard(lake)):
            pass
        model = {
            "stream": STREAM,
            "version": 1,
            "model": f"{STREAM}@1",
            "windows": [1],
            "published_at": datetime.now(UTC),
        }
        held = {"stream": STREAM, "window": 1, "prediction_id": "alices-prediction", "revision": 2, "rule": "length"}
        lake.append(
            {
                "generations": pa.Table.from_pylist([model], TABLES["generations"]),
                "quarantine": pa.Table.from_pylist([held], TABLES["quarantine"]),
            }
        )
    return world


def alice(world: World, n: int) -> None:
    """A prediction with a copy, two outcomes, a conflict, a late outcome, and a record that cannot be read."""
    p = world.prediction(n, text=ALICE, prediction_id="alices-prediction")
    first, second = world.outcome(p), world.outcome(p, timedelta(hours=9), "high")
    world.send(p)
    world.send(p)
    for revision, outcome in enumerate((first, second), 1):
        world.send(outcome)
        world.send(world.ground_truth(p, outcome, revision))
    world.refuse(world.send(world.prediction(n, "something else", p.prediction_id)), "conflicting_prediction")
    world.refuse(world.send(world.outcome(p, timedelta(hours=30), "high")), "late")
    broken = b'{"prediction_id":"alices-prediction","inputs":{"text":"' + ALICE.encode() + b'"}'
    world.refuse(world.send_raw(world.names.predictions, broken, b"?"), "not_json")


def books(world: World) -> Any:
    with open_lake(world.config) as newest:
        snapshot = newest.snapshot_id()
    with open_lake(world.config, at_snapshot=snapshot) as lake:
        return audit(lake, world.contracts, world.names, Scope())


def everything(config: Config, less: str) -> dict[str, list[Any]]:
    with open_lake(config) as lake:
        return {
            table: sorted(map(str, lake.rows(f"from {table} where {less}")))
            for table in ("predictions", "outcomes", "ground_truth_history")
        }


OTHERS = "prediction_id <> 'alices-prediction'"


@pytest.mark.parametrize(
    ("config", "by"),
    [
        ("sqlite", "prediction_id"),
        ("sqlite", "inputs.text"),
        ("encrypted", "inputs.text"),
        ("production", "inputs.text"),
    ],
    indirect=["config"],
)
def test_nothing_is_left_of_the_subject_and_everything_of_the_others(
    request: pytest.FixtureRequest, world: World, by: str, tmp_path: Path
) -> None:
    config = world.config
    folders = [tmp_path]
    if config.lake.s3_endpoint and (buckets := request.getfixturevalue("s3_server")[1]):
        folders.append(buckets / request.getfixturevalue("s3_bucket")[1])
    subject = subject_of(config, world.contracts[STREAM], ALICE if by == "inputs.text" else "alices-prediction", by)
    before, others = books(world), everything(config, OTHERS)
    assert before.balanced
    with open_lake(config) as lake:
        found = find(lake, world.names, subject)
    rows = {"predictions": 3, "outcomes": 3, "ground_truth_history": 2, "dead_letters": 3}
    assert found.rows == rows | {"quarantine": 1}
    assert (found.windows, [taught.model for taught in found.generations]) == ([1], [f"{STREAM}@1"])
    assert not prove(config, subject, found).clean  # the proof sees what is there

    with open_lake_for_writing(config) as lake:
        maintain(lake, keep_snapshots=AT_ONCE, keep_files=AT_ONCE)
        assert erase(lake, config, subject) == found
    compact_catalog(config)
    proof = prove(config, subject, found)
    assert (proof.traces, proof.mentions) == ([], [])
    assert proof.rows > 200 and proof.files > 4

    # By other means than the proof's own: the bytes of all that is on the disk.
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        assert b"alices-prediction" not in path.read_bytes()
        assert ALICE.encode() not in path.read_bytes()
    assert everything(config, "true") == others
    after = books(world)
    assert after.balanced, after.differences
    assert sum(b.erased for b in after.balances) == 4  # three rows, and the one that could not be read
    assert sum(b.captured for b in after.balances) == sum(b.captured for b in before.balances)
    assert [o.captured for o in after.outcomes] == [o.captured for o in before.outcomes]
    assert sum(o.erased for o in after.outcomes) == 3


def test_history_is_forgotten_and_windows_are_read_without_the_rows(world: World) -> None:
    config = world.config
    subject = subject_of(config, world.contracts[STREAM], "alices-prediction", "prediction_id")
    with open_lake(config) as lake:
        old = lake.rows("from windows order by all")
    with open_lake_for_writing(config) as lake:
        erase(lake, config, subject)
    with open_lake(config) as lake:
        new = lake.rows("from windows order by all")
        gone = lake.rows('select "table", "window", count(*) as n from erasures group by all order by all')
    for was, window in zip(old, new, strict=True):
        with pytest.raises(LakeError, match="accrual erase"):
            open_lake(config, at_snapshot=was["snapshot_id"])
        assert {**window, "snapshot_id": 0} == {**was, "snapshot_id": 0}
        with open_lake(config, at_snapshot=window["snapshot_id"]) as pinned:
            [count] = pinned.rows(
                "select count(*) as n from ground_truth where predicted_at >= ? and predicted_at < ?",
                [window["from_time"], window["to_time"]],
            )
        assert count["n"] == was["rows"] - (window["window"] == 1)
    assert [(r["table"], r["window"], r["n"]) for r in gone] == [
        ("dead_letters", None, 3),
        ("ground_truth_history", 1, 2),
        ("outcomes", None, 3),
        ("predictions", 1, 3),
        ("quarantine", None, 1),
    ]
    with open_lake(config) as lake:
        [touched] = touched_windows(lake, STREAM)
    assert (touched.window, touched.erased, touched.predictions, touched.generations) == (1, 1, 0, [f"{STREAM}@1"])


@pytest.mark.parametrize("config", ["sqlite", "production"], indirect=True)
def test_what_is_kept_in_the_catalog_goes_too(world: World) -> None:
    config = world.config
    subject = subject_of(config, world.contracts[STREAM], "alices-prediction", "prediction_id")
    with open_lake_for_writing(config) as lake:
        [row] = lake.rows("from ground_truth_history where prediction_id = 'alices-prediction' and revision = 1")
        double = row | {"offset": 9_999, "first_offset": row["offset"], "why": "equal"}
        lake.append({"doubles": pa.Table.from_pylist([double], TABLES["doubles"])})
        found = erase(lake, config, subject)
    assert found.rows["doubles"] == 1
    compact_catalog(config)
    proof = prove(config, subject, found)
    assert (proof.traces, proof.mentions) == ([], [])
    assert books(world).balanced


def test_the_record_has_no_data_and_knows_its_subject(world: World) -> None:
    subject = subject_of(world.config, world.contracts[STREAM], ALICE, "inputs.text")
    with open_lake_for_writing(world.config) as lake:
        erase(lake, world.config, subject)
        rows = lake.rows("from erasures")
        assert {row["subject"] for row in rows} == {digest_of(world.config)(ALICE)}
        assert {row["prediction"] for row in rows} <= {digest_of(world.config)("alices-prediction"), None}
        assert not any(row["moment"] for row in rows)  # later ones of each partition are still there
        again = erase(lake, world.config, subject)
        assert not any(again.rows.values())
        assert len(lake.rows("from erasures")) == len(rows)


def test_one_that_was_cut_short_is_finished_by_the_same_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(world.config, world.contracts[STREAM], "alices-prediction", "prediction_id")
    with open_lake_for_writing(world.config) as lake, monkeypatch.context() as broken:
        broken.setattr("accrual.erasure._forget", lambda _: (_ for _ in ()).throw(LakeError("killed here")))
        with pytest.raises(LakeError, match="killed here"):
            erase(lake, world.config, subject)
    with open_lake_for_writing(world.config) as lake:
        found = erase(lake, world.config, subject)
        assert not any(found.rows.values())
        assert lake.rows("select count(*) as n from erasures where \"table\" = 'predictions'") == [{"n": 3}]
    compact_catalog(world.config)
    assert prove(world.config, subject, found).traces == []
    assert books(world).balanced


def test_what_comes_again_is_found_again(world: World) -> None:
    config, contract = world.config, world.contracts[STREAM]
    subject = subject_of(config, contract, "alices-prediction", "prediction_id")
    with open_lake_for_writing(config) as lake:
        erase(lake, config, subject)
        p = world.prediction(40, text=ALICE, prediction_id="alices-prediction")
        world.send(world.ground_truth(p, world.outcome(p), 3))
        world.pour(lake)
        assert find(lake, world.names, subject).rows["ground_truth_history"] == 1
        assert any(d.kind == "not predicted" for d in audit(lake, world.contracts, world.names, Scope()).differences)
        assert erase(lake, config, subject).rows["ground_truth_history"] == 1


def test_the_last_of_a_partition_goes_and_event_time_stays(config: Config) -> None:
    world = World(config)
    with open_lake_for_writing(config) as lake:
        world.minutes(0, 30)
        world.let_time_pass()
        world.pour(lake)
        for row in lake.rows("select prediction_id as id from predictions where prediction_id like 'late%'"):
            subject = subject_of(config, world.contracts[STREAM], row["id"], "prediction_id")
            found = erase(lake, config, subject)
        assert len(lake.rows("from erasures where moment is not null")) == 4  # a prediction and an outcome of each
    compact_catalog(config)
    assert prove(config, subject, found).traces == []
    assert books(world).balanced


@pytest.mark.parametrize("config", ["production"], indirect=True)
def test_a_sink_that_commits_meanwhile_is_not_undone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deletion begins anew, and sees what was added."""
    world = World(config)
    subject = subject_of(config, world.contracts[STREAM], "alices-prediction", "prediction_id")
    attempts: list[Found] = []
    with open_lake_for_writing(config) as lake, open_lake_for_writing(config) as sink:
        alice(world, 40)
        world.pour(lake)

        def find_while_a_sink_commits(*given: Any) -> Found:
            attempts.append(find(*given))
            if len(attempts) == 1:
                rows = [
                    {"stream": STREAM, "prediction_id": name, "day": START.date()}
                    for name in ("alices-prediction", "somebody")
                ]
                sink.append({"predictions": pa.Table.from_pylist(rows, TABLES["predictions"])})
            return attempts[-1]

        monkeypatch.setattr("accrual.erasure.find", find_while_a_sink_commits)
        found = erase(lake, config, subject)
        assert [attempt.rows["predictions"] for attempt in attempts] == [3, 4]
        assert [row["prediction_id"] for row in lake.rows("from predictions")] == ["somebody"]
        assert prove(config, subject, found).clean
        p = world.prediction(1)
        world.send(p)
        world.send(world.outcome(p))
        world.pour(lake)  # into a table that was left without a row, and without statistics
        for table in ("predictions", "outcomes"):
            for condition in (f"prediction_id = '{p.prediction_id}'", f"stream = '{STREAM}' and prediction_id > 'p'"):
                assert lake.rows(f"select count(*) as n from {table} where {condition}")[0]["n"] >= 1
            assert lake.rows(f"select count(*) as n from {table} where prediction_id < 'a'") == [{"n": 0}]


class TestCommand:
    """What a person sees."""

    @pytest.fixture
    def accrual(self, config: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        for name, value in config.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ACCRUAL_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
        names = TopicNames(config.topics.prefix)
        kept = {names.predictions: timedelta(days=7), names.ground_truth: None, names.changelog: None}
        monkeypatch.setattr("accrual.commands.erase.retentions", lambda _: kept)
        return lambda *words: CliRunner().invoke(app, ["erase", "--stream", STREAM, *words])

    def test_a_dry_run_is_what_happens_without_yes_and_with_it_the_proof_is_shown(
        self, world: World, accrual: Callable[..., Any]
    ) -> None:
        before = everything(world.config, "true")
        for words in ((), ("--yes", "--dry-run")):
            done = accrual("--subject", "alices-prediction", *words)
            assert done.exit_code == 0
            assert "Nothing was done" in done.output
            said = " ".join(done.output.split())
            assert f"{STREAM}@1 was trained on windows 1" in said
            assert ".predictions keeps its records until 2025-12-01 16:00 UTC" in said
            assert ".ground-truth keeps its records for ever" in said
            assert ".join-changelog keeps its records until the join forgets them, 31 days of event time" in said
            assert everything(world.config, "true") == before
        done = accrual("--subject", ALICE, "--by", "inputs.text", "--yes", "--json")
        assert done.exit_code == 0, done.output
        report = json.loads(done.output)
        assert report["proof"]["traces"] == []
        assert report["found"]["rows"]["predictions"] == 3
        again = accrual("--subject", ALICE, "--by", "inputs.text", "--yes")
        assert "Nothing of the subject is left" in again.output

    def test_mistakes_are_named(
        self, config: Config, accrual: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "its inputs are text" in str(accrual("--subject", "x", "--by", "inputs.name").exception)
        assert "not by 'name'" in str(accrual("--subject", "x", "--by", "name").exception)
        with open_lake_for_writing(config):
            assert "has one writer: stop that one first" in str(accrual("--subject", "x", "--yes").exception)
        monkeypatch.setenv("ACCRUAL_PII_KEY", "")
        assert "ACCRUAL_PII_KEY" in str(accrual("--subject", "x").exception)


@pytest.mark.parametrize(("to", "seed"), [("latest", 2), ("all", 1)])
def test_the_books_of_a_stream_joined_by_an_entity_balance_without_one(tmp_path: Path, to: str, seed: int) -> None:
    """Duplicates, conflicts, orphans and strays of the entity, played by the join itself."""
    rule = contract(to)
    config = Config(state=str(tmp_path), topics=Topics(prefix="test"), pii=Pii(KEY))
    subject = subject_of(config, rule, "loan1", "entity")
    with open_lake_for_writing(config) as lake:
        poured(lake, played(tmp_path / "join", rule, seed), rule)
        before = audit(lake, {"toy": rule}, NAMES, Scope())
        one = lake.rows("select min(prediction_id) as id from predictions where entity = 'loan1'")[0]["id"]
        by_id = find(lake, NAMES, subject_of(config, rule, one, "prediction_id"))
        found = erase(lake, config, subject)
        assert found.rows["outcomes"] and found.rows["dead_letters"]
        assert by_id == found  # whichever of its predictions is named
        after = audit(lake, {"toy": rule}, NAMES, Scope())
    assert (before.differences, after.differences) == ([], [])
    assert after.balanced
    assert sum(b.captured for b in after.balances) == sum(b.captured for b in before.balances)
    compact_catalog(config)
    assert prove(config, subject, found).traces == []


def test_a_pseudonym_is_found_by_what_it_stands_for(config: Config) -> None:
    """Also under a name of before, and nobody else's."""
    world = World(config)
    email = Field("string", was="mail", pii="pseudonymise")
    rule = msgspec.structs.replace(world.contracts[STREAM], inputs={"text": Field("string"), "email": email})
    hidden = pseudonym_of(KEY)
    with open_lake_for_writing(config) as lake:
        for n, (name, address) in enumerate([("email", "a@x.org"), ("mail", "a@x.org"), ("email", "b@x.org")]):
            inputs = msgspec.Raw(encode({"text": "a@x.org is down", name: hidden(address)}))
            world.send(msgspec.structs.replace(world.prediction(n), inputs=inputs))
        world.pour(lake)
        subject = subject_of(config, rule, "a@x.org", "inputs.email")
        found = erase(lake, config, subject)
        assert found.ids == ["p-000000", "p-000001"]
        assert found.pending == 2
        assert [row["prediction_id"] for row in lake.rows("from predictions")] == ["p-000002"]
    compact_catalog(config)
    assert prove(config, subject, found).clean
