"""The books balance on disorderly input: the real join and the audit's recomputation agree, whatever is sent.

Everything that may happen to an id happens here: copies and conflicts, outcomes before, late, revised, twice, or for
nobody; records in the wrong partition, broken ones, and outcomes so late that their prediction is forgotten.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from accrual.config import Config, Kafka, Topics
from accrual.kafka import TopicNames, create_topics, partition_of, producer
from accrual.lake import open_lake

PARTITIONS = 3
START = datetime(2025, 1, 1, tzinfo=UTC)
CONTRACT = """
stream: {stream}
inputs: {{text: {{type: string}}}}
output: {{classes: [a, b, c], open: true}}
outcome: {{values: {values}}}
label: {label}
horizon: 1d
on_expiry: {expiry}
late: {late}
disorder: 1h
remember: 2d
training: {{template: '{{text}}', window_rows: 50}}
"""
# By stream: the contract's variables, and the values an outcome may have there.
STREAMS = {
    "refuses": (
        {"values": "{x: {type: string}}", "label": "{field: x}", "expiry": "a", "late": "dead_letter"},
        ['{"x":"a"}', '{"x":"b"}', '{"x":"a","x":"b"}', '{"more":1,"x":"z\\u00e9"}'],
    ),
    "counts": (
        {"values": "{x: {type: boolean}}", "label": "{field: x}", "expiry": "censored", "late": "count"},
        ['{"x":true}', '{"x":false}'],
    ),
    "revises": (
        {"values": "{x: {type: number}}", "label": "{field: x}", "expiry": "censored", "late": "revise"},
        ['{"x":1}', '{"x":2.5}', '{"x":1e2}', '{"x":-0}'],
    ),
    "maps": (
        {
            "values": "{x: {type: integer}}",
            "label": "{field: x, map: {'0': a, '1': b}}",
            "expiry": "b",
            "late": "revise",
        },
        ['{"x":0}', '{"x":1}'],
    ),
    "first-ranked": (
        {
            "values": "{x: {type: string}}",
            "label": "{field: x, take: first, sources: [agent]}",
            "expiry": "a",
            "late": "count",
        },
        ['{"x":"a"}', '{"x":"b"}', '{"x":"c"}'],
    ),
    "last-ranked": (
        {
            "values": "{x: {type: boolean}}",
            "label": "{field: x, complete_when: 2, sources: [customer, agent]}",
            "expiry": "censored",
            "late": "revise",
        },
        ['{"x":true}', '{"x":false}'],
    ),
    "majority": (
        {
            "values": "{x: {type: string}}",
            "label": "{field: x, map: {A: a, B: b, b: b}, take: majority, complete_when: 2}",
            "expiry": "c",
            "late": "dead_letter",
        },
        ['{"x":"A"}', '{"x":"B"}', '{"x":"b"}'],
    ),
    "sums": (
        {
            "values": "{x: {type: number}}",
            "label": "{field: x, take: sum, thresholds: {c: 0.3, b: 0.2}, sources: [agent, customer]}",
            "expiry": "a",
            "late": "revise",
        },
        ['{"x":0.1}', '{"x":2e-1}', '{"x":0}', '{"x":1}'],
    ),
    "votes": (
        {
            "values": "{x: {type: integer}, sure: {type: boolean, optional: true}}",
            "label": "{expression: 'x * 2 if sure else x', take: sum, thresholds: {a: 2, b: -.inf}, complete_when: 2}",
            "expiry": "censored",
            "late": "count",
        },
        ['{"x":1}', '{"x":-1,"sure":true}', '{"x":1,"sure":true}', '{"x":2,"x":-1,"sure":null}'],
    ),
    "computes": (
        {
            "values": "{status: {type: string}, days: {type: integer, optional: true}}",
            "label": "{expression: \"'a' if lower(status) == 'it\\\\'s' or coalesce(days, 0) / 30 >= 3 else status\"}",
            "expiry": "b",
            "late": "revise",
        },
        ['{"status":"It\'s"}', '{"status":"b","days":90}', '{"status":"b","days":89}', '{"days":1,"status":"z\u00e9"}'],
    ),
}

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(500)]


class Sent(NamedTuple):
    """A record, and when on the clock of event time it is sent."""

    at: datetime
    topic: str
    key: bytes | None
    value: bytes | None


@pytest.fixture
def config(bootstrap: str, prefix: str, tmp_path: Path) -> Config:
    folder = tmp_path / "contracts"
    folder.mkdir()
    for stream, (variables, _) in STREAMS.items():
        (folder / f"{stream}.yaml").write_text(CONTRACT.format(stream=stream, **variables))
    made = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=PARTITIONS),
        state=str(tmp_path / "state"),
        contracts=str(folder),
    )
    create_topics(made)
    return made


@pytest.mark.parametrize("seed", range(int(os.environ.get("ACCRUAL_BOOKS_SEEDS", "1"))))
def test_the_books_balance_whatever_is_sent(config: Config, seed: int) -> None:
    chance = random.Random(seed)
    names = TopicNames(config.topics.prefix)
    records = sorted(disorder(chance, names, 3000), key=lambda sent: sent.at)
    env = {**os.environ, **config.environment()}
    commands = [["-m", "streams", "worker", "--web-port", "0"], ["-m", "consumers", "sink"]]
    workers = [subprocess.Popen([sys.executable, *c], env=env, stderr=subprocess.DEVNULL) for c in commands]
    report = config.state_dir / "audit.json"
    try:
        target = producer(config)
        for part in range(10):  # in batches, so that event time passes between them
            for sent in records[part * len(records) // 10 : (part + 1) * len(records) // 10]:
                target.produce(sent.topic, sent.value, sent.key, place(chance, sent.key))
            target.flush()
            time.sleep(chance.uniform(0.2, 1.0))
        wait_until_all_is_read(config, len(records))
        audit = [sys.executable, "-m", "consumers", "audit", "--wait", "60", "--json", str(report)]
        done = subprocess.run(audit, env=env, stdout=subprocess.DEVNULL, check=False)
        wait_until_a_window_is_sealed(config)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(30)
    found = json.loads(report.read_text())
    assert found["audit"]["differences"] == []
    assert done.returncode == 0
    balances, outcomes = found["audit"]["balances"], found["audit"]["outcomes"]
    for bucket in ("labeled", "expired", "dead_lettered", "duplicate"):
        assert sum(balance[bucket] for balance in balances) > 20
    for bucket in ("incomplete", "late", "orphaned", "duplicate", "dead_lettered"):
        assert sum(balance[bucket] for balance in outcomes) > 20
    with open_lake(config) as lake:
        reasons = {row["reason"] for row in lake.rows("select distinct reason from dead_letters")}
    assert {"late", "orphan", "too_old", "conflicting_prediction", "not_json", "invalid_event"} <= reasons


def disorder(chance: random.Random, names: TopicNames, count: int) -> Iterator[Sent]:
    """What happens to `count` ids, ten minutes of event time apart."""
    for n in range(count):
        stream = chance.choice(list(STREAMS))
        key = f"{stream}-{n}".encode()
        moment = START + timedelta(minutes=n * 10 - chance.randrange(50))

        def sent(topic: str, value: bytes | None, hours: float, k: bytes | None = key, at: datetime = moment) -> Sent:
            return Sent(at + timedelta(hours=hours, minutes=chance.randrange(30)), topic, k, value)

        once = prediction(stream, n, moment)
        if chance.random() < 0.9:
            yield sent(names.predictions, once, 0)
        if chance.random() < 0.1:
            yield sent(names.predictions, once, chance.randrange(100))
        if chance.random() < 0.1:
            yield sent(names.predictions, prediction(stream, n, moment, "other"), chance.randrange(90))
        if chance.random() < 0.03:
            # Of an id of its own: once an id is forgotten, a later prediction with it is a new one (a double record).
            old = prediction(stream, n + count, moment - timedelta(days=10))
            yield sent(names.predictions, old, 1, f"{stream}-{n + count}".encode())
        for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
            after = chance.choice([1, 2, 20, 23, 25, 40, 70, 80, 100])
            what = outcome(chance, stream, n, moment + timedelta(hours=after))
            late = after + chance.choice([0, 0, 0, 1, 60, 120])
            yield sent(names.outcomes, what, late)
            if chance.random() < 0.2:
                yield sent(names.outcomes, what, late + chance.choice([0, 1, 50, 150]))
        if chance.random() < 0.05:
            yield sent(names.outcomes, b'{"broken', 0)
        if chance.random() < 0.05:
            yield sent(names.predictions, once.replace(b'"m@0"', b"7"), 0)
        if chance.random() < 0.02:
            yield sent(names.outcomes, None, 0, None)


def prediction(stream: str, n: int, at: datetime, text: str = "as usual") -> bytes:
    event = {
        "prediction_id": f"{stream}-{n}",
        "stream": stream,
        "model": "m@0",
        "predicted_at": at.isoformat(),
        "inputs": {"text": text},
        "output": {"label": "a", "probabilities": {"a": 1}},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def outcome(chance: random.Random, stream: str, n: int, at: datetime) -> bytes:
    values, source = chance.choice(STREAMS[stream][1]), chance.choice(["agent", "customer"])
    return (
        f'{{"prediction_id":"{stream}-{n}","stream":"{stream}","observed_at":"{at.isoformat()}",'
        f'"values":{values},"source":"{source}"}}'
    ).encode()


def place(chance: random.Random, key: bytes | None) -> int:
    """The right partition; now and then, as of a producer with another partitioner, a wrong one."""
    home = partition_of(key or b"", PARTITIONS)
    return (home + 1) % PARTITIONS if chance.random() < 0.03 else home


def wait_until_all_is_read(config: Config, records: int) -> None:
    """Return once the sink has read at least what was sent (the join adds what it forwards)."""
    until = time.monotonic() + 90
    names = TopicNames(config.topics.prefix)
    while time.monotonic() < until:
        with open_lake(config) as lake:
            read = lake.rows(
                "select sum(next_offset) as n from offsets where topic in (?, ?)", [names.predictions, names.outcomes]
            )[0]["n"]
        if read >= records:
            time.sleep(2)  # what the join made of the last ones
            return
        time.sleep(0.5)
    raise AssertionError(f"the sink has read {read} of {records} records")


def wait_until_a_window_is_sealed(config: Config) -> None:
    """Return once one is; after a look in vain the sink pauses ten times as long as it took."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        with open_lake(config) as lake:
            if lake.rows("from windows"):
                return
        time.sleep(0.5)
    raise AssertionError("no window was sealed")
