"""What was a dead letter becomes ground truth: the cause is removed, the letters are replayed, the books balance."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from accrual.config import Config, Kafka, Topics
from accrual.dead_letters import Choice, read_letters
from accrual.errors import LakeUnavailable
from accrual.events import GroundTruth, decode_ground_truth, encode
from accrual.kafka import TopicNames, create_topics, partition_of, producer, read_to_end
from accrual.lake import open_lake
from tests.eventually import eventually

PARTITIONS = 2
START = datetime(2026, 3, 1, tzinfo=UTC)
CONTRACT = """
stream: {stream}
inputs: {{x: {{type: number}}}}
output: {{classes: ["yes", "no"]}}
outcome: {{values: {{answer: {{type: string}}}}}}
label: {{field: answer}}
horizon: 10h
on_expiry: "no"
late: {late}
disorder: 1h
remember: 10000h
training: {{template: "{{x}}"}}
"""

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def config(bootstrap: str, prefix: str, tmp_path: Path) -> Config:
    made = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=PARTITIONS),
        state=str(tmp_path / "state"),
        contracts=str(tmp_path / "contracts"),
    )
    Path(made.contracts).mkdir()
    add_contract(made, "orders", "dead_letter")
    create_topics(made)
    return made


def add_contract(config: Config, stream: str, late: str) -> None:
    (Path(config.contracts) / f"{stream}.yaml").write_text(CONTRACT.format(stream=stream, late=late))


def python(config: Config, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **config.environment()},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@contextmanager
def stages(config: Config) -> Iterator[None]:
    """A join worker and a sink; stopped at the end, the sink first, as docs/dead-letters.md says."""
    commands = [["-m", "streams", "worker", "--web-port", "0"], ["-m", "consumers", "sink"]]
    environment = {**os.environ, **config.environment()}
    processes = [subprocess.Popen([sys.executable, *c], env=environment, stderr=subprocess.DEVNULL) for c in commands]
    try:
        yield
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


Event = tuple[str, bytes]


def prediction(stream: str, id_: str, hour: float, **changes: Any) -> Event:
    said = {"label": "yes", "probabilities": {"yes": 0.7, "no": 0.3}}
    moment = START + timedelta(hours=hour)
    event = {"stream": stream, "prediction_id": id_, "model": "m@0", "predicted_at": moment, "inputs": {"x": 1}}
    return id_, encode(event | {"output": said} | changes)


def outcome(stream: str, id_: str, hour: float, answer: str) -> Event:
    moment = START + timedelta(hours=hour)
    return id_, encode({"stream": stream, "prediction_id": id_, "observed_at": moment, "values": {"answer": answer}})


def send(config: Config, predictions: list[Event], outcomes: list[Event]) -> None:
    names = TopicNames(config.topics.prefix)
    client = producer(config)
    for topic, events in ((names.predictions, predictions), (names.outcomes, outcomes)):
        for id_, value in events:
            client.produce(topic, value, id_.encode())
    assert client.flush(30) == 0


def let_time_pass(config: Config, stream: str, hour: float) -> None:
    """A prediction and its outcome in every partition, so much later."""
    named = {partition_of(f"tide-{n}".encode(), PARTITIONS): f"tide-{n}" for n in range(100)}
    ids = list(named.values())
    send(config, [prediction(stream, id_, hour) for id_ in ids], [outcome(stream, id_, hour, "yes") for id_ in ids])


def letters(config: Config) -> Counter[tuple[str, str | None]]:
    return Counter((filed.letter.reason, filed.letter.prediction_id) for filed in read_letters(config, Choice()))


def ground_truth(config: Config) -> list[GroundTruth]:
    topic = TopicNames(config.topics.prefix).ground_truth
    return [decode_ground_truth(message.value() or b"") for message in read_to_end(config, topic)]


def of(config: Config, id_: str) -> list[tuple[str, str | None, int]]:
    return [(row.status, row.label, row.revision) for row in ground_truth(config) if row.prediction_id == id_]


def replay(config: Config, *arguments: str) -> str:
    done = python(config, "-c", "from accrual.cli import main; main()", "dead-letters", "replay", *arguments, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_books_balance(config: Config) -> dict[str, Any]:
    """The audit agrees once the sink has read all there is; returns what it found."""
    names = TopicNames(config.topics.prefix)
    topics = [names.predictions, names.outcomes, names.ground_truth, names.dead_letters]
    last = {
        (topic, message.partition()): message.offset() for topic in topics for message in read_to_end(config, topic)
    }

    def all_is_read() -> bool:
        try:
            lake = open_lake(config)
        except LakeUnavailable:
            return False
        with lake:
            read = {(row["topic"], row["partition"]): row["next_offset"] for row in lake.rows("from offsets")}
        return all(read.get(place, 0) > (offset or 0) for place, offset in last.items())

    eventually(all_is_read)
    report = config.state_dir / "audit.json"
    done = python(config, "-m", "consumers", "audit", "--wait", "20", "--json", str(report))
    found: dict[str, Any] = json.loads(report.read_text())["audit"]
    assert found["differences"] == []
    assert done.returncode == 0, done.stdout + done.stderr
    return found


def test_letters_of_a_stream_without_contract_become_ground_truth(config: Config) -> None:
    with stages(config):
        returns = [(f"r{n}", "yes" if n % 2 else "no") for n in range(20)]
        send(
            config,
            [
                *(prediction("returns", id_, 1) for id_, _ in returns),
                prediction("orders", "newer", 1, v=2),
                prediction("orders", "o1", 1),
            ],
            [*(outcome("returns", id_, 2, answer) for id_, answer in returns), outcome("orders", "o1", 1.5, "yes")],
        )
        eventually(lambda: letters(config).total() == 41 and of(config, "o1"))
        first = assert_books_balance(config)
    assert Counter(reason for reason, _ in letters(config).elements()) == {
        "unknown_stream": 40,
        "unsupported_version": 1,
    }
    assert sum(balance["dead_lettered"] for balance in first["balances"]) == 21

    add_contract(config, "returns", "dead_letter")
    with stages(config):
        assert "Wrote 40 records again." in replay(config, "--reason", "unknown_stream", "--stream", "returns")
        eventually(lambda: len(ground_truth(config)) == 21)
        assert {id_: of(config, id_) for id_, _ in returns} == {id_: [("labeled", a, 1)] for id_, a in returns}
        assert_books_balance(config)
        rows = len(ground_truth(config))

        replay(config, "--reason", "unknown_stream", "--stream", "returns")  # once more: no harm
        replay(config, "--reason", "unsupported_version")  # and too early: no worker knows the version
        eventually(lambda: letters(config)["unsupported_version", "newer"] == 2)
        found = assert_books_balance(config)
        assert len(ground_truth(config)) == rows
        assert letters(config).total() == 42
        [day] = [balance for balance in found["balances"] if balance["stream"] == "returns" and balance["labeled"]]
        assert (day["labeled"], day["duplicate"]) == (20, 20)

    # A lake that is made anew reads the first copies with today's contracts. They are dead letters all the same.
    shutil.rmtree(config.state_dir / "lake")
    with stages(config):
        again = assert_books_balance(config)
        totals = [sum(balance["captured"] for balance in audit["balances"]) for audit in (found, again)]
        assert totals[0] == totals[1]


def test_letters_that_the_join_judged_are_judged_again(config: Config) -> None:
    with stages(config):
        send(
            config,
            [
                prediction("orders", "late", 1),
                prediction("orders", "twice", 1),
                prediction("orders", "twice", 1, model="m@1"),
            ],
            [outcome("orders", "lost", 1, "yes"), outcome("orders", "late", 30, "yes")],
        )
        let_time_pass(config, "orders", 100)
        judged = {("orphan", "lost"): 1, ("late", "late"): 1, ("conflicting_prediction", "twice"): 1}
        eventually(lambda: letters(config) == judged)
        assert letters(config) == judged

        replay(config, "--stream", "orders")  # nothing has changed
        judged |= {("orphan", "lost"): 2, ("conflicting_prediction", "twice"): 2}
        eventually(lambda: letters(config) == judged)
        assert_books_balance(config)
        assert letters(config) == judged

        send(config, [prediction("orders", "lost", 1)], [])  # the prediction of the orphan has come
        eventually(lambda: of(config, "lost"))
        assert of(config, "lost") == [("expired", "no", 0)]
        replay(config, "--reason", "orphan")
        eventually(lambda: len(of(config, "lost")) == 2)
        assert of(config, "lost")[1:] == [("labeled", "yes", 1)]
        assert_books_balance(config)
