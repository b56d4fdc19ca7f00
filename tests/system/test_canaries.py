"""Canaries on a stream of their own: sent, joined, windowed and caught; and a rule that catches too few is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from accrual import Distribution, Recorder
from accrual.config import Config, Kafka, Topics
from accrual.errors import LakeUnavailable
from accrual.kafka import create_topics
from accrual.lake import open_lake
from accrual.supervisor import Supervisor
from tests.eventually import eventually

pytestmark = [pytest.mark.system, pytest.mark.slow]

CONTRACT = """
stream: {stream}
inputs: {{text: {{type: string}}, amount: {{type: number, minimum: 0}}}}
output: {{classes: [low, high]}}
outcome:
  values: {{urgency: {{type: string}}}}
label: {{field: urgency}}
horizon: 2s
on_expiry: censored
late: count
disorder: 1s
idle: 1s
quality:
  rules:
    - {{name: no_personal_data, field: text, pii: forbid}}
    - {{name: no_debt, field: amount, range: {{least: 0}}}}
    - {{name: short, field: text, length: {{most: {longest}}}}}
    - {{name: hardly_big, expression: 'amount < 1000', severity: warn}}
{canaries}training: {{template: '{{text}}', window_rows: 10}}
"""
CANARIES = "  canaries: {rows: 8, recall: 1.0, seed: 5}\n"


def write(folder: Path, stream: str, canaries: str = CANARIES, longest: int = 40) -> None:
    contract = CONTRACT.format(stream=stream, canaries=canaries, longest=longest)
    (folder / f"{stream}.yaml").write_text(contract)


def run(config: Config, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consumers", "canaries", *arguments]
    env = {**os.environ, **config.environment()}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=100)


def found(config: Config) -> tuple[int, dict[str, Any]]:
    done = run(config, "--found", "tickets-canaries", "--json")
    return done.returncode, msgspec.json.decode(done.stdout)


def test_canaries_go_the_way_of_all_events_and_are_caught(bootstrap: str, prefix: str, tmp_path: Path) -> None:
    contracts = tmp_path / "contracts"
    contracts.mkdir()
    write(contracts, "tickets", canaries="")
    write(contracts, "tickets-canaries")
    write(contracts, "others", longest=50)
    config = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=2),
        state=str(tmp_path / "state"),
        contracts=str(contracts),
    )
    create_topics(config)
    with Supervisor(tmp_path / "logs", config.environment()) as supervisor:
        supervisor.start("join", [sys.executable, "-m", "streams", "worker", "--web-port", "0"])
        supervisor.start("sink", [sys.executable, "-m", "consumers", "sink"])
        with Recorder("tickets", config) as recorder:
            for n in range(30):
                inputs = {"text": f"It is down since {n}", "amount": n}
                prediction_id = recorder.predict(
                    inputs, Distribution(label="low", probabilities={"low": 1.0}), model="tickets@0"
                )
                recorder.outcome(prediction_id, {"urgency": "high"})
        eventually(lambda: labeled(config))
        other = run(config, "tickets", "--into", "others")
        assert other.returncode == 1 and "quality.rules is not what tickets has; copy it" in other.stderr
        same = run(config, "tickets", "--into", "tickets")
        assert same.returncode == 1 and "a stream of their own" in same.stderr
        planned = run(config, "tickets", "--into", "tickets-canaries", "--dry-run", "--json")
        expected = {"no_personal_data": 8, "no_debt": 8, "short": 8}
        assert msgspec.json.decode(planned.stdout) == {"sent": False, "canaries": expected}
        for _ in range(2):  # the last sending counts
            sent = run(config, "tickets", "--into", "tickets-canaries")
            assert sent.returncode == 0, sent.stderr
        became: dict[str, Any] = {}
        until = time.monotonic() + 90
        while time.monotonic() < until and sum(f["decided"] for f in became.get("canaries", [])) < 18:
            time.sleep(0.5)
            code, became = found(config)
            assert code == 0, "what waits for its window is not missed"
    by_rule = {fate["rule"]: fate for fate in became["canaries"]}
    assert {rule: fate["sent"] for rule, fate in by_rule.items()} == expected
    assert by_rule["no_debt"]["refused"] == 8, "the contract's minimum ended them as dead letters"
    assert by_rule["no_personal_data"]["quarantined"] + by_rule["short"]["quarantined"] >= 10
    assert {fate["recall"] for fate in by_rule.values()} == {1.0} and became["missed"] == []


def labeled(config: Config) -> bool:
    try:
        with open_lake(config) as lake:
            return len(lake.rows("from ground_truth where status = 'labeled'")) == 30
    except LakeUnavailable:  # it is being made
        return False
