"""The sink against a real broker: each record once, whatever is killed, repeated, broken or away."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from accrual.config import Config
from accrual.errors import LakeError, LakeUnavailable, TopicMismatch
from accrual.kafka import create_topics, delete_topics
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_maintenance import table_sizes
from consumers import sink
from consumers.progress import Progress, serving
from tests.consumers.conftest import World

SINK = [sys.executable, "-m", "consumers", "sink"]


def start(config: Config, *options: str) -> subprocess.Popen[str]:
    env = {**os.environ, **config.environment()}
    return subprocess.Popen([*SINK, *options], env=env, stderr=subprocess.PIPE, text=True)


def ask(config: Config, sql: str) -> list[dict[str, Any]]:
    with open_lake(config) as lake:
        return lake.rows(sql)


def wait_for_rows(config: Config, expected: dict[str, int], timeout_s: float = 60.0) -> None:
    """Return once the tables have these numbers of rows; they must not grow beyond."""
    until = time.monotonic() + timeout_s
    found: dict[str, int] = {}
    while found != expected:
        assert time.monotonic() < until, f"{found}, expected {expected}"
        time.sleep(0.2)
        try:
            with open_lake(config) as lake:
                found = {table: lake.rows(f'select count(*) as n from "{table}"')[0]["n"] for table in expected}
        except LakeUnavailable:
            continue


def counts(world: World) -> dict[str, int]:
    """How many rows what was sent so far must become."""
    names, broken = world.names, sum(r.v == b"{broken" for r in world.records)
    topics = [r.to for r in world.records]
    return {
        "predictions": topics.count(names.predictions) - broken,
        "outcomes": topics.count(names.outcomes),
        "ground_truth_history": topics.count(names.ground_truth),
        "dead_letters": topics.count(names.dead_letters),
    }


@contextmanager
def running(world: World) -> Iterator[Progress]:
    """The sink in a thread of this process."""
    stop, progress = threading.Event(), Progress()
    thread = threading.Thread(target=sink.run, args=(world.config, world.contracts, stop, progress))
    thread.start()
    try:
        yield progress
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def wait_until_serving(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if "/health and /metrics on port" in line:
            return


def test_killed_at_any_moment_it_loses_nothing_and_repeats_nothing(kafka_world: World) -> None:
    world, chance = kafka_world, random.Random(5)
    expected = dict.fromkeys(("predictions", "outcomes", "ground_truth_history", "dead_letters"), 0)
    for round_ in range(5):
        world.minutes(round_ * 3000, 3000)
        expected = {table: expected[table] + more for table, more in counts(world).items()}
        killed = start(world.config)
        if round_ % 2:
            world.publish()
        time.sleep(chance.uniform(0.5, 3.5))
        if world.records:
            world.publish()
            time.sleep(chance.uniform(0.1, 1.0))
        killed.kill()
        killed.wait()
    last = start(world.config)
    try:
        wait_for_rows(world.config, expected)
        positions = 'count(distinct (partition, "offset")) as positions, count(*) as rows'
        for table in ("predictions", "outcomes", "ground_truth_history"):
            [found] = ask(world.config, f"select {positions} from {table}")
            assert found["positions"] == found["rows"] == expected[table]
    finally:
        last.terminate()
        assert last.wait(30) == 0, last.stderr and last.stderr.read()
    again = start(world.config, "--port", "0")  # a second run finds nothing to add
    wait_until_serving(again)
    time.sleep(2)
    again.terminate()
    assert again.wait(30) == 0
    wait_for_rows(world.config, expected)


def test_one_that_is_stopped_finishes_its_batch(kafka_world: World) -> None:
    kafka_world.minutes(0, 500)
    expected = counts(kafka_world)
    kafka_world.publish()
    with running(kafka_world) as progress:
        while not progress.commits:
            time.sleep(0.05)
    wait_for_rows(kafka_world.config, expected, timeout_s=5)


def test_a_second_sink_ends_with_the_name_of_the_first(kafka_world: World) -> None:
    with open_lake_for_writing(kafka_world.config):
        second = start(kafka_world.config)
        _, message = second.communicate(timeout=30)
    assert second.returncode == 1
    assert f"process {os.getpid()} writes this lake" in message
    assert "Traceback" not in message


def test_offsets_claimed_by_another_writer_send_it_back_to_them(kafka_world: World) -> None:
    """As a zombie would find them: what it read since is not committed, and not lost either."""
    kafka_world.minutes(0, 300)
    first = counts(kafka_world)
    kafka_world.publish()
    real = sink.arrow_tables
    interfering, interfered = threading.Event(), threading.Event()
    opened: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:

        def interfere(records: Any, by_topic: Any) -> Any:
            if interfering.is_set() and not interfered.is_set():
                interfered.set()
                opened[-1].rows("update lake.owners set owner = 'another'")
            return real(records, by_topic)

        really_open = sink.open_lake_for_writing
        patch.setattr(sink, "open_lake_for_writing", lambda c: opened.append(really_open(c)) or opened[-1])
        patch.setattr(sink, "arrow_tables", interfere)
        with running(kafka_world):
            wait_for_rows(kafka_world.config, first)
            interfering.set()
            kafka_world.minutes(300, 300)
            expected = {table: first[table] + more for table, more in counts(kafka_world).items()}
            kafka_world.publish()
            wait_for_rows(kafka_world.config, expected)
            assert interfered.is_set()
            assert len(opened) == 2


def test_a_busy_lake_is_waited_for(kafka_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    kafka_world.minutes(0, 200)
    expected = counts(kafka_world)
    kafka_world.publish()
    refusals = iter([LakeUnavailable("busy"), LakeUnavailable("still busy")])
    real = sink.WritableLake.append

    def busy(*arguments: Any) -> bool:
        for refusal in refusals:
            raise refusal
        return real(*arguments)

    monkeypatch.setattr(sink.WritableLake, "append", busy)
    with running(kafka_world):
        wait_for_rows(kafka_world.config, expected)


def test_without_a_broker_it_waits_and_says_so(world: World, caplog: pytest.LogCaptureFixture) -> None:
    away = Config(
        kafka=type(world.config.kafka)(bootstrap_servers="127.0.0.1:9"),
        state=world.config.state,
        contracts=world.config.contracts,
    )
    stop, progress = threading.Event(), Progress()
    thread = threading.Thread(target=sink.run, args=(away, world.contracts, stop, progress))
    thread.start()
    until = time.monotonic() + 30
    while "no Kafka broker answers" not in caplog.text and time.monotonic() < until:
        time.sleep(0.1)
    assert progress.health()["status"] == "trouble"
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    assert "trying again" in caplog.text


def test_poison_on_every_topic_stops_nothing(kafka_world: World) -> None:
    names = kafka_world.names
    poison = [None, b"", b"{", b"\xff" * 50, b"[" * 100_000, b"null", b'{"v":99}', b'{"revision":1e300}']
    for topic in (
        names.predictions,
        names.outcomes,
        names.ground_truth,
        names.dead_letters,
        names.models,
        names.training,
    ):
        for value in poison:
            if not (topic == names.models and value is None):
                kafka_world.send_raw(topic, value, b"k")
    nul = kafka_world.prediction(0, text='a\x00b"\ud7ff', prediction_id="nul \x00 ' \U0001f3c6")
    kafka_world.send(nul)
    kafka_world.publish()
    with running(kafka_world):
        wait_for_rows(kafka_world.config, {"predictions": 1, "ground_truth_history": 0, "dead_letters": 0})
    assert ask(kafka_world.config, "select prediction_id from predictions")[0]["prediction_id"] == nul.prediction_id


def test_topics_made_anew_under_a_lake_are_an_error_that_says_so(kafka_world: World) -> None:
    kafka_world.minutes(0, 100)
    expected = counts(kafka_world)
    kafka_world.publish()
    with running(kafka_world):
        wait_for_rows(kafka_world.config, expected)
    delete_topics(kafka_world.config)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            create_topics(kafka_world.config)
            break
        except TopicMismatch:
            time.sleep(0.5)
    with pytest.raises(TopicMismatch, match="recreated"):
        sink.run(kafka_world.config, kafka_world.contracts, threading.Event(), Progress())


def test_a_check_of_a_window_that_fails_does_not_stop_capture(
    kafka_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LakeError("no such function")

    monkeypatch.setattr("consumers.windows.recompute", broken)
    kafka_world.minutes(0, 200)
    kafka_world.let_time_pass()
    expected = counts(kafka_world)
    kafka_world.publish()
    with running(kafka_world):
        wait_for_rows(kafka_world.config, expected)


def test_health_and_metrics(kafka_world: World) -> None:
    kafka_world.minutes(0, 50)
    expected = counts(kafka_world)
    kafka_world.publish()
    with running(kafka_world) as progress, serving(progress, 0) as port:
        wait_for_rows(kafka_world.config, expected)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            assert b'"status": "ok"' in answer.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b'accrual_sink_rows_total{table="predictions"}' in answer.read()
    progress.trouble("the broker is away")
    with serving(progress, 0) as port, pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")


def test_sigterm_ends_it_cleanly(kafka_world: World) -> None:
    process = start(kafka_world.config, "--port", "0")
    wait_until_serving(process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in rest


def test_while_it_keeps_up_it_keeps_the_lake_small(kafka_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumers.keeper._PAUSE_S", 0.0)
    monkeypatch.setattr("consumers.keeper._PAUSE_FACTOR", 0.0)
    monkeypatch.setattr("accrual.lake_maintenance._SURPLUS", 1)
    expected = {"predictions": 0}
    with running(kafka_world) as progress:
        for round_ in range(3):
            kafka_world.minutes(round_ * 100, 100)
            expected["predictions"] += counts(kafka_world)["predictions"]
            kafka_world.publish()
            wait_for_rows(kafka_world.config, expected)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with open_lake(kafka_world.config) as lake:
                surplus = sum(size.surplus for size in table_sizes(lake))
            if not surplus:
                break
            time.sleep(0.5)
        assert progress.commits > 2
    assert surplus == 0
    wait_for_rows(kafka_world.config, expected)


def test_maintenance_that_fails_does_not_stop_capture(kafka_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LakeError("no such function")

    monkeypatch.setattr("consumers.keeper._PAUSE_S", 0.0)
    monkeypatch.setattr("consumers.keeper.maintain", broken)
    kafka_world.minutes(0, 200)
    expected = counts(kafka_world)
    with running(kafka_world):
        time.sleep(3)
        kafka_world.publish()
        wait_for_rows(kafka_world.config, expected)
