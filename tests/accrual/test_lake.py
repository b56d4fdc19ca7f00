"""The lake: its writers, readers that never wait for it, snapshots, and offsets that move once."""

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from accrual.config import Config, Lake
from accrual.errors import LakeConflict, LakeError, LakeLocked, LakeUnavailable
from accrual.lake import Move, open_lake, open_lake_for_writing
from accrual.lake_tables import TABLES, VIEWS
from accrual.lake_views import QUESTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgres"])
def config(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> Config:
    """An empty lake, with each kind of catalog."""
    if request.param == "sqlite":
        return Config(state=str(tmp_path / "state of 'mine'"))
    catalog = request.getfixturevalue("postgres_catalog")
    return Config(state=str(tmp_path / "state"), lake=Lake(catalog=catalog, data=str(tmp_path / "data")))


def generation(version: int, offset: int = 0, digest: str = "d") -> pa.Table:
    row = {"stream": "s", "version": version, "model": f"s@{version}", "windows": [1, 2], "offset": offset}
    return pa.Table.from_pylist([row | {"digest": digest}], TABLES["generations"])


def test_without_a_lake_the_message_says_who_makes_it(config: Config) -> None:
    with pytest.raises(LakeUnavailable, match="accrual sink"):
        open_lake(config)


def test_all_tables_are_there_and_a_second_opening_changes_nothing(config: Config) -> None:
    open_lake_for_writing(config).close()
    with open_lake(config) as lake:
        snapshot = lake.snapshot_id()
    open_lake_for_writing(config).close()
    with open_lake(config) as lake:
        assert lake.snapshot_id() == snapshot
        for name in {*TABLES, *VIEWS, *QUESTIONS} - {"moves"}:
            assert lake.rows(f'select * from "{name}"') == []
        for name, schema in TABLES.items():
            assert lake.arrow(f'select * from "{name}"').column_names == schema.names


def test_a_lake_whose_views_are_still_to_be_made_is_not_there_yet(config: Config) -> None:
    with open_lake_for_writing(config) as lake:
        lake.rows("drop view lake.offsets")
    with pytest.raises(LakeUnavailable, match="no offsets yet"):
        open_lake(config)
    open_lake_for_writing(config).close()
    open_lake(config).close()


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_a_second_writer_is_told_which_process_writes(config: Config) -> None:
    code = (
        "import sys, time\n"
        "from accrual.config import load_config\n"
        "from accrual.lake import open_lake_for_writing\n"
        "lake = open_lake_for_writing(load_config())\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, **config.environment(), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(LakeLocked, match=f"process {writer.pid} writes"):
            open_lake_for_writing(config)
        writer.kill()
    open_lake_for_writing(config).close()  # the lock died with its holder


def test_a_move_is_made_once_and_only_from_where_it_is_expected(config: Config) -> None:
    with open_lake_for_writing(config) as lake:
        assert lake.claim({("t", 0): 0, ("t", 1): 5}) == {("t", 0): 0, ("t", 1): 5}
        assert lake.append({"generations": generation(1)}, [Move("t", 0, 0, 10), Move("t", 1, 5, 6)])
        assert lake.offsets() == {("t", 0): 10, ("t", 1): 6}
        # A zombie repeats its batch; another has one stale move among good ones.
        assert not lake.append({"generations": generation(1)}, [Move("t", 0, 0, 10), Move("t", 1, 5, 6)])
        assert not lake.append({"generations": generation(2)}, [Move("t", 0, 10, 20), Move("t", 1, 5, 6)])
        assert not lake.append({"generations": generation(3)}, [Move("unknown", 0, 0, 1)])
        assert lake.claim({("t", 0): 3, ("t", 2): 7}) == {("t", 0): 10, ("t", 2): 7}
        assert lake.rows("from offsets order by all")[0] == {
            "topic": "t",
            "partition": 0,
            "first_offset": 0,
            "next_offset": 10,
        }
        assert lake.rows("select version, windows from generations") == [{"version": 1, "windows": [1, 2]}]


@pytest.mark.parametrize("config", ["postgres"], indirect=True)
def test_writers_of_different_partitions_do_not_stop_each_other(config: Config) -> None:
    with open_lake_for_writing(config) as one, open_lake_for_writing(config) as other:
        one.claim({("t", 0): 0})
        other.claim({("t", 1): 0})
        with one.transaction():
            assert one.add({"generations": generation(1)}, [Move("t", 0, 0, 10)])
            assert other.append({"generations": generation(2)}, [Move("t", 1, 0, 20)])
        assert one.offsets() == {("t", 0): 10, ("t", 1): 20}
        assert len(one.rows("from generations")) == 2


@pytest.mark.parametrize("config", ["postgres"], indirect=True)
def test_an_owner_that_was_replaced_can_commit_nothing_whenever_it_began(config: Config) -> None:
    with open_lake_for_writing(config) as zombie, open_lake_for_writing(config) as heir:
        zombie.claim({("t", 0): 0})
        with pytest.raises(LakeConflict), zombie.transaction():
            assert zombie.add({"generations": generation(1)}, [Move("t", 0, 0, 10)])
            assert heir.claim({("t", 0): 0}) == {("t", 0): 0}
        assert not zombie.append({"generations": generation(1)}, [Move("t", 0, 0, 10)])
        assert heir.rows("from generations") == []
        assert heir.append({"generations": generation(1)}, [Move("t", 0, 0, 10)])
        assert not zombie.append({"generations": generation(1)}, [Move("t", 0, 10, 20)])


@pytest.mark.parametrize("config", ["postgres"], indirect=True)
def test_the_first_claims_of_all_conflict_too(config: Config) -> None:
    with open_lake_for_writing(config) as one, open_lake_for_writing(config) as other:
        with pytest.raises(LakeConflict), one.transaction():
            one.rows("delete from lake.moves")
            one.rows("insert into lake.moves values ('', 0, 0, 0)")
            other.claim({("t", 0): 0})
        assert one.claim({("t", 0): 0}) == {("t", 0): 0}
        assert one.rows("select count(*) as n from lake.owners") == [{"n": 1}]


def test_a_batch_that_fails_leaves_nothing(config: Config) -> None:
    with open_lake_for_writing(config) as lake:
        lake.claim({("t", 0): 0})
        wrong = pa.table({"no_such_column": [1]})
        with pytest.raises(LakeError):
            lake.append({"generations": generation(1), "runs": wrong}, [Move("t", 0, 0, 1)])
        assert lake.rows("from generations") == []
        assert lake.append({"generations": generation(1)}, [Move("t", 0, 0, 1)])


@pytest.mark.parametrize(
    "predicate",
    [
        "predicted_at >= timestamptz '2025-03-02 05:00' and predicted_at < timestamptz '2025-03-02 07:00'",
        "day = date '2025-03-02'",
    ],
)
@pytest.mark.parametrize("table", ["ground_truth_history", "ground_truth"])
def test_a_day_of_a_stream_is_read_from_its_files_alone(config: Config, table: str, predicate: str) -> None:
    moments = [datetime(2025, month, day, 6, tzinfo=UTC) for month in (2, 3, 4) for day in (1, 2, 3)]
    rows = [
        {"stream": stream, "prediction_id": f"{moment}", "predicted_at": moment, "day": moment.date(), "revision": 1}
        for moment in moments
        for stream in ("a", "b")
    ]
    with open_lake_for_writing(config) as lake:
        lake.append({"ground_truth_history": pa.Table.from_pylist(rows, TABLES["ground_truth_history"])})
        query = f"select count(*) as n from {table} where stream = 'a' and {predicate}"
        assert lake.rows(query) == [{"n": 1}]
        [plan] = lake.rows(f"explain analyze {query}")
        assert "Total Files Read: 1 " in plan["explain_value"]


def test_a_pinned_reader_sees_its_snapshot_and_an_open_one_the_newest(config: Config) -> None:
    with open_lake_for_writing(config) as lake, open_lake(config) as follower:
        lake.append({"generations": generation(1)})
        pinned_at = lake.snapshot_id()
        lake.append({"generations": generation(2)})
        assert len(follower.rows("from generations")) == 2
        with open_lake(config, at_snapshot=pinned_at) as pinned:
            assert pinned.snapshot_id() == pinned_at
            assert [row["version"] for row in pinned.rows("from generations")] == [1]
        with pytest.raises(LakeError, match="no snapshot 10000; it has 0 to"):
            open_lake(config, at_snapshot=10_000)


def test_readers_and_writer_do_not_wait_for_each_other(config: Config) -> None:
    with open_lake_for_writing(config) as lake, open_lake(config) as reader:
        reader.rows("from generations")
        started = time.monotonic()
        with lake.transaction():
            with lake.with_tables({"batch": generation(1)}):
                lake.rows("insert into lake.generations by name select * from batch")
            assert reader.rows("from generations") == []  # the open transaction is invisible, and does not block
        with reader.with_tables({"other": generation(9)}):
            slow = reader.rows("select count(*) as n from generations, other")
        lake.append({"generations": generation(2)})
        assert slow == [{"n": 1}]
        assert len(reader.rows("from generations")) == 2
        assert time.monotonic() - started < 25  # below the busy timeout: nobody waited for a lock


def test_a_reader_cannot_write(config: Config) -> None:
    open_lake_for_writing(config).close()
    with open_lake(config) as reader, pytest.raises(LakeError, match="read-only"):
        reader.rows("delete from generations")


@pytest.mark.parametrize("text", ["a\x00b", "it's", '"', "\U0001f3c6", "x" * 100_000, "", "\\", "\x1f\x7f"])
def test_any_text_comes_back(config: Config, text: str) -> None:
    with open_lake_for_writing(config) as lake:
        assert lake.append({"generations": generation(1, digest=text)})
        assert lake.rows("select digest from generations") == [{"digest": text}]


def test_a_statement_that_is_wrong_names_the_reason(config: Config) -> None:
    open_lake_for_writing(config).close()
    with open_lake(config) as lake, pytest.raises(LakeError, match="nowhere"):
        lake.rows("from nowhere")


def test_a_catalog_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    nobody = "postgres:host=127.0.0.1 port=9 dbname=lake connect_timeout=2 password=hunter2"
    config = Config(state=str(tmp_path), lake=Lake(catalog=nobody, data=str(tmp_path / "data")))
    for opening in (open_lake, open_lake_for_writing):
        with pytest.raises(LakeUnavailable, match="onnect") as refused:
            opening(config)
        assert "hunter2" not in str(refused.value)


def test_a_data_store_that_cannot_be_reached_is_unavailable_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "it's secret")
    store = Lake(data="s3://bucket/lake", s3_endpoint="127.0.0.1:9", s3_use_ssl=False)
    with open_lake_for_writing(Config(state=str(tmp_path), lake=store)) as lake:
        lake.rows("set http_retries = 0")
        with pytest.raises(LakeUnavailable):
            lake.append({"generations": generation(1)})
        assert lake.rows("from generations") == []


class Interrupted(BaseException):
    """Raised by a signal handler, as KeyboardInterrupt is."""


def test_what_a_signal_handler_raises_in_a_query_is_raised_by_it(config: Config) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    with open_lake_for_writing(config) as lake:
        before = signal.signal(signal.SIGUSR1, interrupt)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        try:
            with pytest.raises(Interrupted):
                lake.rows("select sum(a.range * b.range) from range(1_000_000) a, range(40_000) b")
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert lake.rows("select 1 as one") == [{"one": 1}]


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_connections_with_little_memory_spill_beside_each_other_and_leave_nothing(config: Config) -> None:
    open_lake_for_writing(config).close()
    spill = config.state_dir / "lake" / "spill"
    size = 400_000
    ask = f"select hash(range) as h, repeat(hash(range)::varchar, 15) as text from range({size}) order by h"
    with open_lake(config, memory="64MiB") as one, open_lake(config, memory="64MiB") as other:
        readings = [one.batches(ask), other.batches(ask)]
        seen: list[list[int]] = [[], []]
        for batches in zip(*readings, strict=True):
            for batch, so_far in zip(batches, seen, strict=True):
                hashes = batch["h"].to_pylist()
                assert batch["text"].to_pylist() == [str(h) * 15 for h in hashes]
                so_far += hashes
        assert len(list(spill.iterdir())) == 2, "it was more than fits, so this test says something"
    assert seen[0] == seen[1] == sorted(seen[0]) and len(seen[0]) == size
    assert not list(spill.iterdir())


@pytest.mark.parametrize("config", ["sqlite"], indirect=True)
def test_what_killed_processes_have_spilled_is_removed_when_it_is_old(config: Config) -> None:
    open_lake_for_writing(config).close()
    left, in_use = (config.state_dir / "lake" / "spill" / name for name in ("left", "in-use"))
    for folder in (left, in_use):
        folder.mkdir()
        (folder / "duckdb_temp_storage_S32K-0.tmp").touch()
    month_ago = time.time() - 30 * 24 * 3600
    os.utime(left, (month_ago, month_ago))
    open_lake_for_writing(config).close()
    assert in_use.exists() and not left.exists()
