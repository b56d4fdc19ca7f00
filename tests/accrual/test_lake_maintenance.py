"""Maintenance: fewer files, the same rows, and nobody who reads notices."""

import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from accrual.cli import app
from accrual.config import Config, Lake
from accrual.lake import Move, WritableLake, open_lake, open_lake_for_writing
from accrual.lake_maintenance import maintain, table_sizes
from accrual.lake_tables import TABLES

AT_ONCE = timedelta(0)
COMMITS = 40


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A lake of the test's own."""
    return Config(state=str(tmp_path / "state"))


@pytest.fixture
def lake(config: Config) -> Iterator[WritableLake]:
    """With many small commits of two days in it."""
    with open_lake_for_writing(config) as opened:
        for number in range(COMMITS):
            rows = [
                {"stream": "s", "prediction_id": f"{number}-{day}", "day": date(2025, 1, day), "offset": number}
                for day in (1, 2)
            ]
            opened.append({"predictions": pa.Table.from_pylist(rows, TABLES["predictions"])})
        yield opened


def files(config: Config) -> set[Path]:
    return set(Path(config.lake_data).rglob("predictions/**/*.parquet"))


def window(lake: WritableLake, snapshot: int) -> None:
    row = {"stream": "s", "window": 1, "snapshot_id": snapshot, "sealed_at": datetime.now(UTC)}
    lake.append({"windows": pa.Table.from_pylist([row], TABLES["windows"])})


def test_small_files_are_merged_and_the_rows_stay(config: Config, lake: WritableLake) -> None:
    before = lake.rows("from predictions order by all")
    [size] = [size for size in table_sizes(lake) if size.table == "predictions"]
    assert (size.files, size.surplus) == (2 * COMMITS, 2 * COMMITS - 2)
    assert maintain(lake, dry_run=True).merged == ["predictions"]
    assert len(files(config)) == 2 * COMMITS
    assert maintain(lake).merged == ["predictions"]
    [size] = [size for size in table_sizes(lake) if size.table == "predictions"]
    assert (size.files, size.surplus) == (2, 0)
    assert lake.rows("from predictions order by all") == before
    assert maintain(lake).merged == []


def test_what_a_sealed_window_names_is_readable_for_ever(config: Config, lake: WritableLake) -> None:
    at = lake.snapshot_id() - COMMITS // 2
    window(lake, at)
    with open_lake(config, at_snapshot=at) as pinned:
        before = pinned.rows("from predictions order by all")
        assert maintain(lake, keep_snapshots=AT_ONCE, keep_files=AT_ONCE).snapshots >= COMMITS - 2
        maintain(lake, keep_snapshots=AT_ONCE, keep_files=AT_ONCE)
        assert pinned.rows("from predictions order by all") == before
    with open_lake(config, at_snapshot=at) as again:
        assert again.rows("from predictions order by all") == before
    with open_lake(config) as newest:
        assert newest.rows("select count(*) as n from predictions") == [{"n": 2 * COMMITS}]
    assert len(files(config)) < COMMITS


def test_snapshots_and_files_of_late_are_kept(config: Config, lake: WritableLake) -> None:
    there = files(config)
    work = maintain(lake)
    assert (work.snapshots, work.files, work.orphans) == (0, 0, 0)
    assert there < files(config)


def test_files_that_no_commit_knows_go_and_a_dry_run_only_counts_them(config: Config, lake: WritableLake) -> None:
    orphan = next(iter(files(config))).with_name("left-by-a-killed-sink.parquet")
    orphan.write_bytes(b"half")
    assert maintain(lake, keep_files=AT_ONCE, dry_run=True).orphans == 1
    assert orphan.exists()
    assert maintain(lake, keep_files=AT_ONCE).orphans == 1
    assert not orphan.exists()


def test_the_commands(config: Config, lake: WritableLake, monkeypatch: pytest.MonkeyPatch) -> None:
    window(lake, lake.snapshot_id())
    lake.close()
    for name, value in config.environment().items():
        monkeypatch.setenv(name, value)

    def accrual(*words: str) -> str:
        done = CliRunner().invoke(app, ["lake", *words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    assert "78" in accrual("stats")
    assert "s 1" in accrual("snapshots")
    before = files(config)
    assert "would be merged: predictions" in accrual("maintain", "--dry-run")
    assert files(config) == before
    assert "merged: predictions" in accrual("maintain")


def test_the_steps_of_sinks_are_put_together(lake: WritableLake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accrual.lake_maintenance._MOVES", 5)
    lake.claim({("t", 0): 0, ("t", 1): 0})
    for number in range(6):
        assert lake.append({}, [Move("t", 0, number, number + 1)])
    offsets = lake.rows("from offsets order by all")
    maintain(lake)
    assert lake.rows("select count(*) as n from moves where topic = 't'") == [{"n": 2}]
    assert lake.rows("from offsets order by all") == offsets
    assert not lake.append({}, [Move("t", 0, 5, 9)])
    assert lake.append({}, [Move("t", 0, 6, 9), Move("t", 1, 0, 1)])
    assert lake.claim({("t", 0): 0}) == {("t", 0): 9}


def test_other_writers_commit_while_it_goes_on(
    postgres_catalog: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accrual.lake_maintenance._MOVES", 1)
    monkeypatch.setattr("accrual.lake_maintenance._SURPLUS", 1)
    data = Lake(catalog=postgres_catalog, data=str(tmp_path / "data"))
    config = Config(state=str(tmp_path), lake=data)
    ended = threading.Event()

    def keep() -> None:
        with open_lake_for_writing(config) as keeper:
            while not ended.is_set():
                maintain(keeper, keep_snapshots=AT_ONCE)

    with open_lake_for_writing(config) as sink:
        at = sink.claim({("t", 0): 0})["t", 0]
        other = threading.Thread(target=keep)
        other.start()
        try:
            for number in range(30):
                rows = [{"stream": "s", "prediction_id": f"{number}", "day": date(2025, 1, 1), "offset": number}]
                batch = {"predictions": pa.Table.from_pylist(rows, TABLES["predictions"])}
                assert sink.append(batch, [Move("t", 0, at, at + 1)])
                at += 1
        finally:
            ended.set()
            other.join()
        assert sink.offsets() == {("t", 0): 30}
        assert [row["offset"] for row in sink.rows('select "offset" from predictions order by all')] == [*range(30)]
