"""Damage to the lake's files is found, and healed from Kafka as far as the topics reach."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from accrual.kafka import TopicPartition
from accrual.lake import Lake, open_lake, open_lake_for_writing
from accrual.lake_verify import DAMAGED, Found, data_files, record, verify
from consumers.refill import refill
from tests.consumers.conftest import World
from tests.consumers.test_sink import counts, running, wait_for_rows

VERIFY = [sys.executable, "-c", "from accrual.cli import main; main()", "lake", "verify"]
TABLES = ("predictions", "outcomes", "ground_truth_history", "dead_letters")


def damaged(world: World) -> list[Found]:
    with open_lake(world.config) as lake:
        return [one for one in verify(lake, world.config, data_files(lake)) if one.state in DAMAGED]


def content(lake: Lake) -> dict[str, list[dict[str, Any]]]:
    return {table: lake.rows(f'from "{table}" order by all') for table in TABLES}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lose(path: Path) -> None:
    path.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.fixture
def filled(kafka_world: World) -> World:
    """A lake that a sink has filled in two commits or more."""
    expected = dict.fromkeys(TABLES, 0)
    with running(kafka_world):
        for round_ in range(2):
            kafka_world.minutes(round_ * 300, 300)
            expected = {table: expected[table] + more for table, more in counts(kafka_world).items()}
            kafka_world.publish()
            wait_for_rows(kafka_world.config, expected)
    return kafka_world


@pytest.mark.parametrize("recorded", [False, True], ids=["as-written", "merged-and-recorded"])
def test_every_damaged_file_is_found_and_written_again_as_it_was(filled: World, recorded: bool) -> None:
    folder = Path(filled.config.lake_data)
    harms: list[Callable[[Path], None]] = [truncate, lose]
    with open_lake_for_writing(filled.config) as lake:
        if recorded:
            for table in TABLES[:3]:
                lake.rows(f"call ducklake_merge_adjacent_files('lake', '{table}')")
            harms.append(flip_a_byte)
            record(lake, filled.config)
        before, files = content(lake), data_files(lake)
        assert any(file.merged for file in files) == recorded
        history = [*sorted({file.snapshot for file in files})[:2], lake.snapshot_id() - 1]
    counted = "select (select count(*) from predictions), (select count(*) from ground_truth_history)"
    seen = {}
    for snapshot in history:
        with open_lake(filled.config, at_snapshot=snapshot) as lake:
            seen[snapshot] = lake.rows(counted)
    hurt = [file for file in files if file.table in TABLES[: 3 if recorded else 4]]
    for number, file in enumerate(hurt):
        harms[number % len(harms)](folder / file.path)
    found = damaged(filled)
    assert [one.file.path for one in found] == [file.path for file in hurt]
    with open_lake_for_writing(filled.config) as lake:
        done = refill(filled.config, filled.contracts, lake, found)
        assert not [one for one in done if one.why]
        assert content(lake) == before
    assert not damaged(filled)
    for snapshot in history:
        with open_lake(filled.config, at_snapshot=snapshot) as lake:
            assert lake.rows(counted) == seen[snapshot]


def test_what_the_topic_no_longer_has_is_said_by_its_offsets(filled: World) -> None:
    topic = filled.names.predictions
    with open_lake(filled.config) as lake:
        hurt = [file for file in data_files(lake) if file.table == "predictions"]
        [at] = lake.rows('select max("offset") as last from predictions where "partition" = 0')
    admin = AdminClient({"bootstrap.servers": filled.config.kafka.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(topic, 0, at["last"] + 1)]).values():
        future.result()
    for file in hurt:
        truncate(Path(filled.config.lake_data) / file.path)
    ended = subprocess.run(
        [*VERIFY, "--repair"],
        env={**os.environ, **filled.config.environment(), "COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1, ended.stderr
    assert f"{topic}[0]@0.." in ended.stdout
    assert len(damaged(filled)) == len(hurt)


def test_the_command_says_what_is_damaged(filled: World) -> None:
    command = VERIFY
    env = {**os.environ, **filled.config.environment(), "COLUMNS": "300"}
    whole = subprocess.run(command, env=env, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    with open_lake_for_writing(filled.config) as lake:
        record(lake, filled.config)
        file = next(file for file in data_files(lake) if file.table == "predictions")
    flip_a_byte(Path(filled.config.lake_data) / file.path)
    broken = subprocess.run(command, env=env, capture_output=True, text=True)
    assert broken.returncode == 1
    assert file.path in broken.stdout
    assert "altered" in broken.stdout
    assert subprocess.run([*command, "--repair"], env=env, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--json"], env=env, capture_output=True).returncode == 0
