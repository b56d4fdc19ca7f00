"""Files of the lake are recorded as they are when new, and compared with that later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from accrual.config import Config
from accrual.lake import WritableLake, open_lake_for_writing
from accrual.lake_tables import TABLES
from accrual.lake_verify import data_files, record, verify


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(state=str(tmp_path))


@pytest.fixture
def lake(config: Config) -> Iterator[WritableLake]:
    """With three files of one day."""
    with open_lake_for_writing(config) as opened:
        for n in range(3):
            row = {"stream": "s", "prediction_id": f"p-{n}", "day": date(2026, 1, 1), "partition": 1, "offset": 10 * n}
            opened.append({"predictions": pa.Table.from_pylist([row], TABLES["predictions"])})
        yield opened


def states(lake: WritableLake, config: Config) -> list[str]:
    return [found.state for found in verify(lake, config, data_files(lake))]


def paths(lake: WritableLake, config: Config) -> list[Path]:
    return [Path(config.lake_data) / file.path for file in data_files(lake)]


def test_each_kind_of_damage_has_its_name(lake: WritableLake, config: Config) -> None:
    assert states(lake, config) == ["unrecorded"] * 3
    assert record(lake, config) == 3
    assert states(lake, config) == ["ok"] * 3
    gone, short, other = paths(lake, config)
    gone.unlink()
    os.truncate(short, short.stat().st_size - 1)
    content = bytearray(other.read_bytes())
    content[7] ^= 1
    other.write_bytes(content)
    assert states(lake, config) == ["missing", "truncated", "altered"]


def test_before_it_is_recorded_a_file_is_known_by_its_length_and_its_end(lake: WritableLake, config: Config) -> None:
    longer, short, other = paths(lake, config)
    longer.write_bytes(longer.read_bytes() + b"x")
    os.truncate(short, 4)
    other.write_bytes(bytes(other.stat().st_size))
    assert states(lake, config) == ["altered", "truncated", "altered"]


def test_one_that_cannot_be_read_keeps_no_other_from_being_recorded(lake: WritableLake, config: Config) -> None:
    first = paths(lake, config)[0]
    first.write_bytes(bytes(first.stat().st_size))
    assert record(lake, config) == 2
    assert states(lake, config) == ["altered", "ok", "ok"]


def test_what_no_topic_can_give_again_is_kept_in_the_catalog(lake: WritableLake, config: Config) -> None:
    """Found by seed 142 of the sink's chaos suite: a power loss took the file of a sealed window."""
    now = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)
    window = {"stream": "s", "window": 1, "snapshot_id": 3, "from_time": now, "coverage": 0.1, "digest": "'ü"}
    double = {"stream": "s", "revision": 2, "predicted_at": now, "inputs": '{"a": "ü\\u0000"}', "day": date(2026, 1, 2)}
    lake.append(
        {table: pa.Table.from_pylist([row], TABLES[table]) for table, row in (("windows", window), ("doubles", double))}
    )
    assert {file.table for file in data_files(lake)} == {"predictions"}
    for table, row in (("windows", window), ("doubles", double)):
        [found] = lake.rows(f"from {table}")
        assert {name: found[name] for name in row} == row


def test_files_that_were_merged_are_forgotten_and_the_new_one_is_recorded(lake: WritableLake, config: Config) -> None:
    record(lake, config)
    lake.rows("call ducklake_merge_adjacent_files('lake', 'predictions')")
    assert states(lake, config) == ["unrecorded"]
    assert record(lake, config) == 1
    [file] = data_files(lake)
    assert file.merged
    assert file.ranges is not None
    assert [file.ranges.count(f'"first": {n}') for n in (0, 10, 20)] == [1, 1, 1]
    assert lake.rows("select count(*) as n from files")[0]["n"] == 1
    assert record(lake, config) == 0
