"""`accrual pending` over a real lake."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import Result
from typer.testing import CliRunner

from accrual.cli import app
from accrual.config import Config
from accrual.errors import ConfigError
from accrual.kafka import TopicNames
from accrual.lake import open_lake_for_writing
from accrual.lake_tables import TABLES

START = datetime(2025, 1, 1, tzinfo=UTC)
CONTRACT = """
stream: {stream}
inputs: {{text: {{type: string}}}}
output: {{classes: [low, high]}}
outcome: {{values: {{urgency: {{type: string}}}}}}
label: {{field: urgency}}
horizon: {horizon}
training: {{template: '{{text}}'}}
"""


@pytest.fixture
def config(prefix: str, tmp_path: Path) -> Config:
    (tmp_path / "contracts").mkdir()
    for stream, horizon in {"tickets": "30d", "loans": "1y"}.items():
        (tmp_path / "contracts" / f"{stream}.yaml").write_text(CONTRACT.format(stream=stream, horizon=horizon))
    return Config(state=str(tmp_path / "state"), contracts=str(tmp_path / "contracts"))


def fill(config: Config, **rows: list[dict[str, Any]]) -> None:
    with open_lake_for_writing(config) as lake:
        lake.append({table: pa.Table.from_pylist(some, TABLES[table]) for table, some in rows.items()})


def row(id_: str, day: float, offset: int = 0, stream: str = "tickets", **changes: Any) -> dict[str, Any]:
    moment = START + timedelta(days=day)
    times = {"predicted_at": moment, "observed_at": moment, "arrived_at": moment}
    return {
        "stream": stream,
        "prediction_id": id_,
        "partition": 0,
        "offset": offset,
        "model": "m@1",
        **times,
        **changes,
    }


def run(config: Config, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["pending", *arguments], env=config.environment() | {"COLUMNS": "200"})


def found(config: Config, *arguments: str) -> list[dict[str, Any]]:
    done = run(config, "--format", "json", *arguments)
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_what_waits_is_listed_oldest_first_with_its_age_in_event_time(config: Config) -> None:
    predictions = TopicNames(config.topics.prefix).predictions
    fill(
        config,
        predictions=[
            row("young", 50, 5),
            row("old", 1, 0),
            row("old", 1, 6),  # sent twice
            row("old", 0, 7, model="m@9"),  # conflicting: the first counts
            row("labeled", 2, 1),
            row("expired", 3, 2),
            row("refused", 1, 3),
            row("loan", 0, 8, stream="loans"),
        ],
        outcomes=[row("labeled", 61, 0), row("loan-2", 2, 1, stream="loans")],
        ground_truth_history=[
            row("labeled", 2, status="labeled", revision=1),
            row("expired", 3, status="expired", revision=0),
        ],
        dead_letters=[
            row("refused", 1, 3, reason="too_old", topic=predictions),
            row("old", 0, 7, reason="conflicting_prediction", topic=predictions),
            row("young", 50, 5, reason="orphan", topic=TopicNames(config.topics.prefix).outcomes),
        ],
    )
    assert [r["prediction_id"] for r in found(config)] == ["loan", "old", "young"]
    [old, young] = found(config, "--stream", "tickets")
    assert (old["prediction_id"], old["model"], old["age"]) == ("old", "m@1", "P60D")
    assert datetime.fromisoformat(old["deadline"]) == START + timedelta(days=31)
    assert (young["prediction_id"], young["age"]) == ("young", "P11D")
    assert [r["prediction_id"] for r in found(config, "--older-than", "60d")] == ["old"]
    assert found(config, "--older-than", "61d") == []
    [loan] = found(config, "--stream", "loans")
    assert datetime.fromisoformat(loan["deadline"]) == START + timedelta(days=365)

    table = run(config, "--limit", "1", "--stream", "tickets").stdout
    assert "60 days, 0:00:00" in table
    said = "2 predictions wait for a label; the oldest is 60 days, 0:00:00 old. Not shown: 1 younger (--limit)."
    assert said in table
    assert "young" not in table.replace(said, "")
    assert run(config, "--older-than", "1y").stdout == "0 predictions wait for a label.\n"


def test_wrong_questions_name_the_fix(config: Config) -> None:
    fill(config)
    wrong = run(config, "--older-than", "30 days")
    assert (wrong.exit_code, "30d" in wrong.output) == (2, True)
    unknown = run(config, "--stream", "nothing").exception
    assert isinstance(unknown, ConfigError)
    assert "loans, tickets" in str(unknown)
