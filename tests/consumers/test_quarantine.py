"""A decision about a quarantined row goes through Kafka into the lake; a window's report shows what was measured."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from accrual.config import Config
from accrual.errors import NotFound
from accrual.lake import open_lake_for_writing
from accrual.lake_tables import TABLES
from consumers.quality_report import window_report
from consumers.windows import Sealer
from tests.consumers.conftest import STREAM, World
from tests.consumers.test_quality import Desk, contract_with
from tests.consumers.test_sink import ask, running, wait_for_rows


def accrual(config: Config, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **config.environment(), "COLUMNS": "200"}
    command = [sys.executable, "-c", "from accrual.cli import main; main()", "quarantine", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_decisions_reach_the_lake_while_the_sink_runs(kafka_world: World) -> None:
    config = kafka_world.config
    rows = [
        {
            "stream": STREAM,
            "window": 1,
            "prediction_id": f"p-{n}",
            "revision": 1,
            "rule": "text_length" if n < 2 else "known_channel",
            "detail": "text breaks the rule",
            "at": datetime.now(UTC),
        }
        for n in range(3)
    ]
    with open_lake_for_writing(config) as lake:
        lake.append({"quarantine": pa.Table.from_pylist(rows, TABLES["quarantine"])})
    listed = accrual(config, "list", "--rule", "text_length", "--format", "csv")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("quarantined") == 2
    dry = accrual(config, "release", "--rule", "text_length", "--dry-run")
    assert "2 would be released; nothing was decided" in dry.stdout
    assert accrual(config, "release").returncode == 2  # of everything, by mistake
    done = accrual(config, "release", "--rule", "text_length", "--by", "ann", "--note", "looked at")
    assert "2 released" in done.stdout, done.stderr
    assert accrual(config, "reject", "--prediction-id", "p-1").returncode == 0
    with running(kafka_world):
        wait_for_rows(config, {"decisions": 3})
    states = ask(config, 'select prediction_id, state, "by", note from quarantined order by prediction_id')
    assert [(row["prediction_id"], row["state"]) for row in states] == [
        ("p-0", "released"),
        ("p-1", "rejected"),
        ("p-2", "quarantined"),
    ]
    assert (states[0]["by"], states[0]["note"]) == ("ann", "looked at")
    shown = accrual(config, "show", "p-0")
    assert "released" in shown.stdout
    unknown = accrual(config, "show", "nobody")
    assert unknown.returncode == 1
    assert "Traceback" not in unknown.stderr
    again = accrual(config, "release", "--prediction-id", "p-0")
    assert again.returncode == 1
    assert "not released yet" in again.stderr


def test_the_report_of_a_window(config: Config, tmp_path: Path) -> None:
    contract_with(config, "{canary_recall: 0.9}")
    desk = Desk(World(config))
    desk.send({"text": "write to jo@mail.example", "channel": "<b>mail</b>"})
    desk.good(60)
    desk.minute += 3 * 1440
    desk.good(1)
    with open_lake_for_writing(config) as lake:
        desk.world.pour(lake)
        Sealer(lake, desk.world.contracts, desk.world.names).seal(desk.world.guard(lake))
        page = window_report(lake, STREAM, 1)
        with pytest.raises(NotFound, match="no sealed window 2"):
            window_report(lake, STREAM, 2)
    for said in ("Window 1 of tickets", "no_personal_data", "canary recall", "<svg", "quarantined"):
        assert said in page
    assert "<b>mail" not in page
    assert "http" not in page.replace("http-equiv", "")
    env = {**os.environ, **config.environment()}
    file = tmp_path / "window.html"
    command = [sys.executable, "-m", "consumers", "windows", "--stream", STREAM, "--report", "1", "--to", str(file)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert file.read_text() == page
