"""The worker process against a real broker: good events, bad events, and being killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
import pytest
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from accrual import Recorder
from accrual.broker import DevelopmentBroker
from accrual.config import Config, Kafka, Topics
from accrual.contract import load_contracts
from accrual.events import (
    MAX_EVENT_BYTES,
    DeadLetter,
    Distribution,
    GroundTruth,
    Tick,
    decode_dead_letter,
    decode_ground_truth,
    encode,
)
from accrual.kafka import (
    KafkaError,
    KafkaException,
    Producer,
    TopicNames,
    create_topics,
    partition_counts,
    partition_of,
    producer,
    read_to_end,
    transactional_producer,
)
from streams import loop, recovery
from streams.partition import Partition
from streams.turn import Turn
from tests.eventually import eventually

PARTITIONS = 3
START = datetime(2026, 3, 1, tzinfo=UTC)
TIDE = 100.0  # hours after START: later than every deadline below
CONTRACT = """
stream: toy
inputs: {x: {type: number}}
output: {classes: ["yes", "no"]}
outcome: {values: {answer: {type: string}}}
label: {field: answer}
horizon: 10h
on_expiry: "no"
late: dead_letter
disorder: 1h
remember: 1000h
training: {template: "{x}"}
"""

Sending = tuple[str, bytes, bytes]
Rows = dict[str, tuple[str, str | None, int]]

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def config(bootstrap: str, prefix: str, tmp_path: Path) -> Config:
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "toy.yaml").write_text(CONTRACT)
    made = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=PARTITIONS),
        state=str(tmp_path / "state"),
        contracts=str(tmp_path / "contracts"),
    )
    create_topics(made)
    return made


def start(config: Config, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "streams", "worker", *(arguments or ("--web-port", "0"))],
        env={**os.environ, **config.environment()},
    )


@contextmanager
def running(config: Config, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker; stopped cleanly at the end, killed if it must be."""
    worker = start(config, *arguments)
    try:
        yield worker
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) in (0, -signal.SIGTERM)  # by the signal itself where it was only starting
    finally:
        worker.kill()
        worker.wait()


def prediction(id_: str, hour: float = 0, **changes: Any) -> bytes:
    event: dict[str, Any] = {
        "v": 1,
        "prediction_id": id_,
        "stream": "toy",
        "model": "toy@0",
        "predicted_at": START + timedelta(hours=hour),
        "inputs": {"x": 1.5},
        "output": {"label": "yes", "probabilities": {"yes": 0.7, "no": 0.3}},
    }
    return encode(event | changes)


def outcome(id_: str, hour: float, answer: str = "yes", **changes: Any) -> bytes:
    event = {
        "prediction_id": id_,
        "stream": "toy",
        "observed_at": START + timedelta(hours=hour),
        "values": {"answer": answer},
    }
    return encode(event | changes)


def tides() -> Iterator[str]:
    """An id for each partition."""
    for partition in range(PARTITIONS):
        yield next(id_ for n in range(1000) if partition_of((id_ := f"tide-{n}").encode(), PARTITIONS) == partition)


def send_tides(config: Config, client: Producer) -> None:
    """Predictions from far later: once all that was sent before is read, every deadline has passed."""
    topic = TopicNames(config.topics.prefix).predictions
    for id_ in tides():
        client.produce(topic, prediction(id_, TIDE), id_.encode())
    assert client.flush(30) == 0


def send_a_pair_to_each_partition(config: Config) -> None:
    """A prediction and its outcome for each partition: as many rows of ground truth."""
    names, client = TopicNames(config.topics.prefix), producer(config)
    for id_ in tides():
        client.produce(names.predictions, prediction(id_), id_.encode())
        client.produce(names.outcomes, outcome(id_, 1), id_.encode())
    assert client.flush(30) == 0


def ground_truth(config: Config) -> list[GroundTruth]:
    topic = TopicNames(config.topics.prefix).ground_truth
    return [decode_ground_truth(message.value() or b"") for message in read_to_end(config, topic)]


def dead_letters(config: Config) -> list[DeadLetter]:
    topic = TopicNames(config.topics.prefix).dead_letters
    return [decode_dead_letter(message.value() or b"") for message in read_to_end(config, topic)]


def current(rows: list[GroundTruth]) -> Rows:
    return {
        row.prediction_id: (row.status, row.label, row.revision) for row in sorted(rows, key=lambda row: row.revision)
    }


def summary(letters: list[DeadLetter]) -> Counter[tuple[str, bytes | None]]:
    return Counter((letter.reason, letter.value) for letter in letters)


def assert_letters_point_at_their_records(config: Config, letters: list[DeadLetter]) -> None:
    names = TopicNames(config.topics.prefix)
    records = {
        (topic, message.partition(), message.offset()): (message.key(), message.value())
        for topic in (names.predictions, names.outcomes)
        for message in read_to_end(config, topic)
    }
    for letter in letters:
        key, value = records[letter.topic, letter.partition, letter.offset]
        assert (key, None if value is None else value[:MAX_EVENT_BYTES]) == (letter.key, letter.value)


def test_good_late_orphaned_conflicting_repeated_misrouted_and_poisoned_events(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    client = producer(config, **{"message.max.bytes": 4 * MAX_EVENT_BYTES, "compression.type": "lz4"})
    expected: Rows = {}
    for n in range(200):
        id_ = f"id{n}"
        client.produce(names.predictions, prediction(id_), id_.encode())
        if n % 5 == 0:
            expected[id_] = ("expired", "no", 0)
            continue
        expected[id_] = ("labeled", "yes", 1)
        client.produce(names.outcomes, outcome(id_, 2), id_.encode())
        if n % 5 == 1:  # again, and a revision, older one last
            expected[id_] = ("labeled", "no", 2)
            client.produce(names.outcomes, outcome(id_, 2), id_.encode())
            client.produce(names.outcomes, outcome(id_, 3, "no"), id_.encode())
            client.produce(names.predictions, prediction(id_), id_.encode())
    for id_ in ("astray-1", "astray-2", "astray-3"):
        expected[id_] = ("labeled", "yes", 1)
        home = partition_of(id_.encode(), PARTITIONS)
        client.produce(names.predictions, prediction(id_), id_.encode(), (home + 1) % PARTITIONS)
        client.produce(names.outcomes, outcome(id_, 1), id_.encode(), (home + 2) % PARTITIONS)
    poisoned: list[tuple[str, str, bytes | None, bytes | None]] = [
        ("conflicting_prediction", names.predictions, b"id7", prediction("id7", model="toy@1")),
        ("late", names.outcomes, b"id0", outcome("id0", 10.5)),
        ("orphan", names.outcomes, b"nobody", outcome("nobody", 1)),
        ("not_json", names.predictions, b"k", b"not json"),
        ("not_json", names.outcomes, None, None),
        ("not_json", names.outcomes, b"k", b'{"prediction_id": "\xff"}'),
        ("invalid_event", names.predictions, b"p1", b'{"prediction_id": "p1", "stream": "toy"}'),
        ("invalid_event", names.predictions, b"p2", prediction("p2", predicted_at=12)),
        ("unknown_stream", names.predictions, b"p3", prediction("p3", stream="nowhere")),
        ("invalid_id", names.predictions, b"x" * 129, prediction("x" * 129)),
        ("invalid_id", names.predictions, b"other", prediction("p4")),
        ("time_out_of_range", names.predictions, b"p5", prediction("p5", predicted_at="2099-01-01T00:00:00Z")),
        ("time_out_of_range", names.outcomes, b"p6", outcome("p6", 0, observed_at="2099-01-01T00:00:00Z")),
        ("invalid_inputs", names.predictions, b"p7", prediction("p7", inputs={"x": None})),
        ("not_json", names.predictions, b"p8", prediction("p8").replace(b"1.5", b"NaN")),
        ("invalid_output", names.predictions, b"p9", prediction("p9", output={"label": "yes"})),
        ("invalid_values", names.outcomes, b"p10", outcome("p10", 1, "perhaps")),
        ("unsupported_version", names.predictions, b"p11", prediction("p11", v=9)),
        ("invalid_event", names.predictions, b"p12", b'{"model": 1, "deep": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
        ("too_large", names.predictions, b"p13", prediction("p13", inputs={"x": 1, "note": "a" * MAX_EVENT_BYTES})),
    ]
    large = {"x": 1.5, "note": "a" * (MAX_EVENT_BYTES - 1000)}
    expected["large"] = ("labeled", "yes", 1)
    client.produce(names.predictions, prediction("large", inputs=large), b"large")
    client.produce(names.outcomes, outcome("large", 1, values={"answer": "yes", "note": large["note"]}), b"large")
    client.flush(30)  # so that the conflicting one comes second
    for _, topic, key, value in poisoned:
        client.produce(topic, value, key)
    client.flush(30)
    send_tides(config, client)
    with running(config):
        eventually(lambda: current(ground_truth(config)) == expected and len(dead_letters(config)) >= len(poisoned))
    rows, letters = ground_truth(config), dead_letters(config)
    assert current(rows) == expected
    assert max(Counter((row.prediction_id, row.revision) for row in rows).values()) == 1
    kept = [(reason, None if value is None else value[:MAX_EVENT_BYTES]) for reason, _, _, value in poisoned]
    assert summary(letters) == Counter(kept)
    assert_letters_point_at_their_records(config, [letter for letter in letters if letter.key != b"nobody"])
    row = next(row for row in rows if row.prediction_id == "id2")
    assert bytes(row.inputs) == b'{"x":1.5}'
    assert (row.model, row.predicted_at, row.observed_at) == ("toy@0", START, START + timedelta(hours=2))


def test_outcomes_of_a_business_key_label_the_predictions_made_for_it(config: Config) -> None:
    loans = CONTRACT.replace("stream: toy", "stream: loans\njoin: {by: loan_id, to: latest}")
    (Path(config.contracts) / "loans.yaml").write_text(loans)
    says = Distribution(label="yes", probabilities={"yes": 0.7, "no": 0.3})
    with Recorder("loans", config) as recorder:

        def predict(loan: str, hour: float) -> str:
            at = START + timedelta(hours=hour)
            return recorder.predict({"x": 1}, says, model="loans@0", entity=loan, predicted_at=at)

        expected: Rows = {}
        for n in range(30):
            recorder.outcome(None, {"answer": "yes"}, entity=f"L-{n}", observed_at=START + timedelta(hours=3))
            expected[predict(f"L-{n}", 0)] = ("expired", "no", 0)
            expected[predict(f"L-{n}", 2)] = ("labeled", "yes", 1)
            last = predict(f"L-{n}", 4)
            expected[last] = ("expired", "no", 0)
        recorder.outcome(None, {"answer": "yes"}, entity="L-none", observed_at=START + timedelta(hours=3))
        recorder.flush()
        for loan in tides():
            predict(loan, 30)
    port = 20_000 + os.getpid() % 20_000
    with running(config, "--web-port", str(port)):
        eventually(lambda: current(ground_truth(config)) == expected and dead_letters(config))
        with urlopen(f"http://127.0.0.1:{port}/pending/{last}?entity=L-29", timeout=10) as answer:
            [life] = msgspec.json.decode(answer.read())
    assert (life["status"], life["entity"]) == ("expired", "L-29")
    rows, [letter] = ground_truth(config), dead_letters(config)
    assert current(rows) == expected
    assert all(row.entity is not None for row in rows)
    assert (letter.reason, letter.key, letter.prediction_id) == ("orphan", b"L-none", None)


def test_a_batch_that_changes_no_state_still_has_its_dead_letters_and_forwards_what_is_astray(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    client = producer(config)

    def send(topic: str, value: bytes, id_: str, away: int = 0) -> None:
        home = partition_of(id_.encode(), PARTITIONS)
        client.produce(topic, value, id_.encode(), (home + away) % PARTITIONS)
        assert client.flush(30) == 0

    with running(config):
        for id_ in tides():
            send(names.predictions, prediction(id_, 5), id_)
            send(names.outcomes, outcome(id_, 6), id_)
        eventually(lambda: len(ground_truth(config)) == PARTITIONS)
        send(names.predictions, prediction("tide-0", 5, model="toy@1"), "tide-0")
        eventually(lambda: dead_letters(config))
        assert [letter.reason for letter in dead_letters(config)] == ["conflicting_prediction"]
        send(names.predictions, prediction("astray", 5), "astray", away=1)
        time.sleep(1)
        send(names.outcomes, outcome("astray", 6), "astray", away=2)
        eventually(lambda: "astray" in current(ground_truth(config)))
        assert current(ground_truth(config))["astray"] == ("labeled", "yes", 1)


def mixture(config: Config, predictions: int, rng: random.Random) -> tuple[list[Sending], Rows, Counter[Any]]:
    """Events of many ids in any order, with the current rows and dead letters they must lead to."""
    names = TopicNames(config.topics.prefix)
    sendings: list[Sending] = []
    rows: Rows = {}
    letters: Counter[Any] = Counter()
    for n in range(predictions):
        id_ = f"id{n}"
        sendings += [(names.predictions, id_.encode(), prediction(id_))] * rng.choice([1, 1, 1, 2])
        seen = {(rng.randint(1, 11), rng.choice(["yes", "no"])) for _ in range(rng.choice([0, 1, 1, 2]))}
        values = {(hour, answer): outcome(id_, hour, answer) for hour, answer in seen}
        for value in values.values():
            sendings += [(names.outcomes, id_.encode(), value)] * rng.choice([1, 1, 2])
        in_time = sorted(o for o in seen if o[0] <= 10)
        letters.update(("late", values[o]) for o in seen if o[0] > 10)
        rows[id_] = ("labeled", in_time[-1][1], len(in_time)) if in_time else ("expired", "no", 0)
        if n % 50 == 0:
            sendings += [(names.outcomes, b"lost%d" % n, outcome(f"lost{n}", 1)), (names.outcomes, b"k", b"bad%d" % n)]
            letters.update([("orphan", outcome(f"lost{n}", 1)), ("not_json", b"bad%d" % n)])
    rng.shuffle(sendings)
    return sendings, rows, letters


def send(config: Config, sendings: list[Sending], seconds: float) -> None:
    """Spread over some seconds, then let time pass."""
    client = producer(config)
    started = time.monotonic()
    for n, (topic, key, value) in enumerate(sendings):
        client.produce(topic, value, key)
        if n % 100 == 0:
            client.poll(0)
            time.sleep(max(0.0, started + seconds * n / len(sendings) - time.monotonic()))
    client.flush(30)
    send_tides(config, client)


def assert_exactly_once(config: Config, expected: Rows, letters: Counter[Any]) -> None:
    eventually(lambda: current(ground_truth(config)) == expected and summary(dead_letters(config)) == letters)
    rows = ground_truth(config)
    wrong = {id_: (expected[id_], row) for id_, row in current(rows).items() if row != expected.get(id_)}
    assert not dict(list(wrong.items())[:10])
    assert current(rows).keys() == expected.keys()
    twice = [key for key, count in Counter((row.prediction_id, row.revision) for row in rows).items() if count > 1]
    assert not twice[:10]
    assert summary(dead_letters(config)) == letters


@pytest.mark.timeout(200)
def test_killed_at_any_moment_nothing_is_lost_doubled_or_wrong(config: Config) -> None:
    rng = random.Random(os.environ.get("ACCRUAL_TEST_SEED"))
    sendings, expected, letters = mixture(config, 10_000, rng)
    seconds = 15.0
    sender = threading.Thread(target=send, args=(config, sendings, seconds), daemon=True)
    sender.start()
    for number in range(5):
        worker = start(config)
        time.sleep(rng.uniform(1.0, 2 * seconds / 5))
        worker.kill()
        worker.wait()
        if number == 2:  # another machine: nothing local is left
            shutil.rmtree(config.state_dir / "join")
    with running(config):
        sender.join()
        assert_exactly_once(config, expected, letters)


@pytest.mark.timeout(200)
def test_a_worker_that_was_frozen_and_replaced_commits_nothing_more(config: Config) -> None:
    rng = random.Random(os.environ.get("ACCRUAL_TEST_SEED"))
    sendings, expected, letters = mixture(config, 10_000, rng)
    sender = threading.Thread(target=send, args=(config, sendings, 10.0), daemon=True)
    with running(config, "--worker-id", "first", "--web-port", "0") as first:
        time.sleep(2)
        sender.start()
        time.sleep(rng.uniform(2.0, 6.0))
        first.send_signal(signal.SIGSTOP)
        with running(config, "--worker-id", "second", "--web-port", "0"):
            time.sleep(20)  # longer than session and transaction last
            first.send_signal(signal.SIGCONT)
            sender.join()
            assert_exactly_once(config, expected, letters)


@pytest.mark.timeout(200)
def test_a_worker_that_is_stopped_hands_its_partitions_over_well_before_its_session_ends(config: Config) -> None:
    with joining(config, "stays") as stays:
        with joining(config, "goes"):
            eventually(lambda: len(stays.status.partitions) < PARTITIONS and stays.status.phase == "running")
        stopped = time.monotonic()
        send_a_pair_to_each_partition(config)
        eventually(lambda: len(ground_truth(config)) == PARTITIONS)
        assert len(ground_truth(config)) == PARTITIONS
        assert stays.status.partitions == tuple(range(PARTITIONS))
        assert time.monotonic() - stopped < loop.SESSION_S - 2


def test_a_killed_worker_that_is_back_soon_has_its_partitions_again_and_the_others_never_stop(config: Config) -> None:
    with joining(config, "stays") as stays:
        killed = start(config, "--web-port", "0", "--worker-id", "killed")
        eventually(lambda: 0 < len(stays.status.partitions) < PARTITIONS and stays.status.phase == "running")
        kept = stays.status.partitions
        killed.kill()
        killed.wait()
        with running(config, "--web-port", "0", "--worker-id", "killed"):
            send_a_pair_to_each_partition(config)
            eventually(lambda: len(ground_truth(config)) == PARTITIONS)
            assert len(ground_truth(config)) == PARTITIONS
            assert stays.status.partitions == kept


@contextmanager
def joining(config: Config, worker: str) -> Iterator[loop.JoinLoop]:
    """A worker's loop in a thread of this process, stopped in order at the end."""
    join = loop.JoinLoop(config, load_contracts(Path(config.contracts)), worker)
    thread = threading.Thread(target=join.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: join.status.phase == "running" and join.status.partitions)
        yield join
    finally:
        join.stop()
        thread.join(30)
    assert (join.failure, thread.is_alive()) == (None, False)


def test_a_broker_that_goes_away_and_returns_costs_nothing_but_time(tmp_path: Path, config: Config) -> None:
    sendings, expected, letters = mixture(config, 3_000, random.Random(7))
    broker = DevelopmentBroker(tmp_path / "broker")
    port = broker.start().port
    try:
        own = msgspec.structs.replace(config, kafka=Kafka(bootstrap_servers=f"127.0.0.1:{port}"))
        create_topics(own)
        sender = threading.Thread(target=send, args=(own, sendings, 15.0), daemon=True)
        with running(own) as worker:
            eventually(lambda: (own.state_dir / "join").is_dir())
            sender.start()
            time.sleep(5)
            broker.stop()
            time.sleep(5)
            broker.start(port)
            sender.join()
            assert_exactly_once(own, expected, letters)
            assert worker.poll() is None
    finally:
        broker.stop()


def test_what_an_open_transaction_holds_back_is_waited_for(config: Config) -> None:
    """A worker that was killed while it forwarded a record leaves one in an input topic, for 15 seconds."""
    names = TopicNames(config.topics.prefix)
    home = partition_of(b"held", PARTITIONS)
    quiet = next(id_ for n in range(1000) if partition_of((id_ := f"quiet{n}").encode(), PARTITIONS) == home)
    tide = next(id_ for id_ in tides() if partition_of(id_.encode(), PARTITIONS) == home)
    client, killed = producer(config), transactional_producer(config, "killed")
    killed.init_transactions(10)
    with running(config):
        client.produce(names.predictions, prediction(quiet), quiet.encode())
        client.flush(30)
        killed.begin_transaction()
        killed.produce(names.predictions, prediction("forwarded"), b"forwarded", home)
        killed.flush(10)
        client.produce(names.predictions, prediction("held"), b"held")
        client.produce(names.outcomes, outcome("held", 1), b"held")
        client.produce(names.outcomes, outcome(tide, TIDE), tide.encode())
        client.flush(30)
        time.sleep(8)
        assert (ground_truth(config), dead_letters(config)) == ([], [])
        killed.abort_transaction(10)
        expected: Rows = {"held": ("labeled", "yes", 1), quiet: ("expired", "no", 0)}
        eventually(lambda: current(ground_truth(config)) == expected)
        assert current(ground_truth(config)) == expected


def test_what_fails_in_a_rebalance_is_tried_again(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the group's coordinator does not answer: it ended the loop's thread, and the worker stood still."""
    recoveries: list[bool] = []

    def failing_once(*arguments: Any) -> None:
        recoveries.append(True)
        if len(recoveries) == 1:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        recovery.recover(*arguments)

    monkeypatch.setattr(loop, "recover", failing_once)
    join = loop.JoinLoop(config, load_contracts(Path(config.contracts)), "worker")
    thread = threading.Thread(target=join.run, daemon=True)
    thread.start()
    eventually(lambda: join.status.phase == "running" and len(recoveries) == 2)
    join.stop()
    thread.join(30)
    assert (len(recoveries), join.failure, thread.is_alive()) == (2, None, False)


def test_a_worker_that_is_stopped_while_it_recovers_joins_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when two workers are stopped at once: the one gets the other's partitions, and knows too little of them."""
    joined: list[bool] = []

    def joining(*_arguments: Any) -> Turn:
        joined.append(True)
        return Turn(0, TopicNames(config.topics.prefix))

    join = loop.JoinLoop(config, load_contracts(Path(config.contracts)), "worker")
    monkeypatch.setattr(loop, "recover", lambda *_: join.stop())
    monkeypatch.setattr(Partition, "turn", joining)
    thread = threading.Thread(target=join.run, daemon=True)
    thread.start()
    thread.join(60)
    assert (joined, join.failure, thread.is_alive()) == ([], None, False)


def test_the_web_views_say_how_it_is_and_what_is_known(config: Config) -> None:
    client = producer(config)
    names = TopicNames(config.topics.prefix)
    client.produce(names.predictions, prediction("one"), b"one")
    client.produce(names.outcomes, outcome("one", 1), b"one")
    client.produce(names.outcomes, outcome("two", 1), b"two")
    client.produce(names.predictions, prediction("four", 2), b"four")
    client.flush(30)

    def get(path: str) -> tuple[int, bytes]:
        try:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read()
        except HTTPError as exc:
            return exc.code, exc.read()
        except OSError:
            return 0, b""

    port = 20_000 + os.getpid() % 20_000
    with running(config, "--web-port", str(port)):
        eventually(lambda: get("/pending/one")[0] == 200 and get("/pending/two")[0] == 200)
        [one] = msgspec.json.decode(get("/pending/one")[1])
        assert (one["status"], one["label"], one["revision"]) == ("labeled", "yes", 1)
        assert (one["model"], one["predicted_at"]) == ("toy@0", "2026-03-01T00:00:00+00:00")
        assert (one["source"], one["outcomes_seen"], one["outcomes_counting"]) == ("outcome", 1, 1)
        assert one["deadline"] == "2026-03-01T10:00:00+00:00"
        assert one["forgotten_after"] == "2026-04-12T02:00:00+00:00"
        assert (one["expired"], "10:00:00" in one["waits_for"]) == (False, True)
        [two] = msgspec.json.decode(get("/pending/two")[1])
        assert (two["status"], two["outcomes_seen"]) == ("outcome waits for its prediction", 1)
        assert two["outcomes_observed_at"] == ["2026-03-01T01:00:00+00:00"]
        assert "orphan after 2026-03-01T12:00:00" in two["waits_for"]
        [four] = msgspec.json.decode(get("/pending/four")[1])
        assert (four["status"], four["label"], four["expired"], four["outcomes_seen"]) == ("pending", None, False, 0)
        assert "expires at 2026-03-01T12:00:00" in four["waits_for"]
        status, body = get("/pending/three")
        assert (status, msgspec.json.decode(body)["partition"]) == (404, partition_of(b"three", PARTITIONS))
        status, body = get("/health")
        assert (status, msgspec.json.decode(body)["partitions"]) == (200, [0, 1, 2])
        assert b'accrual_join_events_total{became="labeled"} 1.0' in get("/metrics")[1]
        client.produce(names.outcomes, outcome("one", 2, "no", source="audit"), b"one")
        send_tides(config, client)
        eventually(lambda: msgspec.json.decode(get("/pending/four")[1])[0]["expired"])
        [one], [four] = (msgspec.json.decode(get(f"/pending/{id_}")[1]) for id_ in ("one", "four"))
        assert (one["status"], one["label"], one["revision"], one["source"]) == ("labeled", "no", 2, "audit")
        assert (one["outcomes_seen"], one["expired"]) == (2, False)
        assert (four["status"], four["label"], four["revision"]) == ("expired", "no", 0)
        assert get("/pending/two")[0] == 404


def said(config: Config) -> str:
    """What a worker says on stderr that cannot start."""
    ended = subprocess.run(
        [sys.executable, "-m", "streams", "worker", "--web-port", "0"],
        env={**os.environ, **config.environment()},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr


@pytest.mark.parametrize("how", ["recreated", "emptied"])
def test_a_changelog_that_lost_records_stops_the_worker_with_what_to_do(config: Config, how: str) -> None:
    names = TopicNames(config.topics.prefix)
    client = producer(config)
    for n in range(30):
        client.produce(names.predictions, prediction(f"id{n}"), f"id{n}".encode())
    for id_ in tides():  # some state in every partition
        client.produce(names.predictions, prediction(id_), id_.encode())
        client.produce(names.outcomes, outcome(id_, 1), id_.encode())
    client.flush(30)
    with running(config):
        eventually(lambda: len(ground_truth(config)) == PARTITIONS)
        time.sleep(1)
    shutil.rmtree(config.state_dir / "join")
    admin = AdminClient({"bootstrap.servers": config.kafka.bootstrap_servers})
    if how == "emptied":
        deletes = ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)
        topic = ConfigResource(ConfigResource.Type.TOPIC, names.changelog, incremental_configs=[deletes])
        admin.incremental_alter_configs([topic])[topic].result(30)
        everything = [KafkaPartition(names.changelog, p, -1) for p in range(PARTITIONS)]
        for future in admin.delete_records(everything).values():
            future.result(30)
    else:
        admin.delete_topics([names.changelog])[names.changelog].result(30)
        eventually(lambda: create_topics(config) or names.changelog in partition_counts(config))
    assert "all is joined once more" in said(config)


def test_on_a_silent_stream_predictions_expire_by_the_clock_and_the_time_is_in_the_log(config: Config) -> None:
    quick = CONTRACT.replace("10h", "3s").replace("disorder: 1h", "disorder: 0s\nidle: 1s")
    (Path(config.contracts) / "toy.yaml").write_text(quick)
    names = TopicNames(config.topics.prefix)
    client = producer(config)
    client.produce(names.predictions, prediction("one"), b"one")
    client.flush(30)
    with running(config):
        eventually(lambda: current(ground_truth(config)) == {"one": ("expired", "no", 0)}, 30)
    assert current(ground_truth(config)) == {"one": ("expired", "no", 0)}
    [_, *ticks] = [message.value() or b"" for message in read_to_end(config, names.predictions)]
    moments = [msgspec.json.decode(tick, type=Tick).at for tick in ticks]
    assert len(moments) >= 1
    assert moments == sorted(moments)
    assert moments[-1] >= START + timedelta(seconds=3)


def test_a_start_that_cannot_work_says_why_and_what_to_do(config: Config) -> None:
    elsewhere = msgspec.structs.replace(config, topics=Topics(prefix=f"{config.topics.prefix}-none"))
    assert "accrual topics create" in said(elsewhere)
    with running(config):
        eventually((config.state_dir / "join").is_dir)
        time.sleep(1)
        assert "--worker-id" in said(config)
