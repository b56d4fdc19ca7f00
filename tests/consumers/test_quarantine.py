"""Decisions about rows in quarantine: made while a sink holds the lake, written by it once, and never overwritten."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from accrual.cli import app
from accrual.config import Config
from accrual.contract import load_contract
from accrual.lake import open_lake, open_lake_for_writing
from consumers import sink
from consumers.progress import Progress
from tests.consumers.conftest import STREAM, World

QUALITY = {
    "rules": [
        {"name": "pii", "field": "text", "pii": "forbid"},
        {"name": "short", "field": "text", "length": {"most": 30}},
    ],
    "bounds": [{"metric": "violations", "field": "pii", "most": 0.02}],
}


def quarantine(config: Config, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["quarantine", *arguments], env=config.environment() | {"COLUMNS": "200"})


def listed(config: Config, *arguments: str) -> dict[tuple[str, str], str]:
    done = quarantine(config, "list", "--format", "json", *arguments)
    assert done.exit_code == 0, done.output
    return {(row["prediction_id"], row["rule"]): row["state"] for row in json.loads(done.stdout)}


def rows(config: Config, sql: str) -> list[dict[str, Any]]:
    with open_lake(config) as lake:
        return lake.rows(sql)


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_person_decides_while_the_sink_runs_and_the_window_is_sealed(kafka_world: World) -> None:
    world = kafka_world
    path = Path(world.config.contracts) / f"{STREAM}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "quality": QUALITY}))
    world.contracts[STREAM] = load_contract(path)
    texts = {7: "jo@mail.example", 8: "me@mail.example", 9: "This is a much longer text than is allowed"}
    for n in range(60):
        p = world.prediction(n, text=texts.get(n, f"It is down {n}"))
        o = world.outcome(p)
        for event in (p, o, world.ground_truth(p, o)):
            world.send(event)
    world.let_time_pass(days=timedelta(days=3) / timedelta(days=1))
    world.publish()
    with open_lake_for_writing(world.config):
        pass  # so that there is one to read
    stop = threading.Event()
    thread = threading.Thread(target=sink.run, args=(world.config, world.contracts, stop, Progress()))
    thread.start()
    try:
        held = {("p-000007", "pii"), ("p-000008", "pii"), ("p-000009", "short")}
        until(lambda: listed(world.config) == dict.fromkeys(held, "quarantined"), "nothing came into quarantine")
        assert rows(world.config, "from windows") == []

        would = quarantine(world.config, "reject", "--rule", "pii", "--dry-run")
        assert "2 entries would be rejected" in would.stdout
        assert quarantine(world.config, "reject", "nobody", "--yes").exit_code == 1
        assert quarantine(world.config, "reject", "--yes").exit_code == 2, "everything is not chosen by accident"
        done = quarantine(world.config, "reject", "--rule", "pii", "--window", "1", "--note", "private", "--yes")
        assert done.exit_code == 0, done.output
        until(lambda: rows(world.config, "from windows") != [], "the window was not sealed")
    finally:
        stop.set()
        thread.join(30)
    assert listed(world.config, "--rule", "pii", "--state", "rejected").keys() == {
        ("p-000007", "pii"),
        ("p-000008", "pii"),
    }
    [window] = rows(world.config, "from windows")
    assert (window["rows"], window["labeled"], window["trainable"]) == (50, 50, 47)
    shown = quarantine(world.config, "show", "p-000007").stdout
    assert "pii: quarantined by check" in shown and "pii: rejected by" in shown and "private" in shown
    assert len(rows(world.config, "from quarantine")) == 5, "each was written once"
