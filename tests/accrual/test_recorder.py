"""The recorder against a real broker, and against none: what is accepted arrives, what is lost is counted and named."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from accrual import AsyncRecorder, BufferFull, Distribution, Recorder, RecorderClosed, Rejected, Undelivered
from accrual.config import Config, Kafka, Topics, load_config
from accrual.contract import load_contracts
from accrual.events import read_outcome, read_prediction
from accrual.kafka import TopicNames, create_topics, partition_of, read_to_end

CONTRACTS = load_contracts(Path(__file__).parents[2] / "schemas" / "contracts")
SAID = Distribution(label="card_arrival", probabilities={"card_arrival": 0.9, "card_linking": 0.1})
QUESTION = {"text": "Where is my card?"}
NOBODY = Config(kafka=Kafka(bootstrap_servers="127.0.0.1:1", client={"log_level": "0"}))


@pytest.fixture
def config(bootstrap: str, prefix: str) -> Config:
    made = Config(kafka=Kafka(bootstrap_servers=bootstrap), topics=Topics(prefix=prefix, partitions=3))
    create_topics(made)
    return made


@pytest.fixture
def lost() -> list[Undelivered]:
    return []


@pytest.fixture
def unreachable(lost: list[Undelivered]) -> Iterator[Recorder]:
    recorder = Recorder("support-intents", NOBODY, on_error=lost.append, buffer_events=3)
    yield recorder
    recorder.close(timeout=0.1)


def records(config: Config, topic: str) -> list[Any]:
    return list(read_to_end(config, topic))


def test_what_is_recorded_passes_the_contract_at_the_other_end(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    moment = datetime(2026, 5, 1, 12, tzinfo=UTC)
    with Recorder("support-intents", config) as recorder:
        ids = [recorder.predict(QUESTION, SAID, model="support-intents@0", predicted_at=moment) for _ in range(50)]
        recorder.outcome(ids[0], {"intent": "card_linking"}, observed_at=moment, source="agent")
        assert recorder.flush() == 0
        assert (recorder.delivered, recorder.failed, recorder.dropped, recorder.buffered) == (51, 0, 0, 0)
    arrived = records(config, names.predictions)
    events = [read_prediction(m.value(), m.key(), m.timestamp()[1], CONTRACTS) for m in arrived]
    assert sorted(e.prediction_id for e in events) == sorted(ids)
    assert {e.predicted_at for e in events} == {moment}
    assert bytes(events[0].inputs) == b'{"text":"Where is my card?"}'
    assert all(m.partition() == partition_of(m.key(), 3) for m in arrived)
    [outcome] = [read_outcome(m.value(), m.key(), m.timestamp()[1], CONTRACTS) for m in records(config, names.outcomes)]
    assert (outcome.prediction_id, outcome.source) == (ids[0], "agent")


def test_an_id_and_a_plain_mapping_of_the_callers_own(config: Config) -> None:
    with Recorder("support-intents", config) as recorder:
        output = {"label": "a", "probabilities": {"a": 1.0}}
        assert recorder.predict(QUESTION, output, model="m@1", prediction_id="mine") == "mine"
    [message] = records(config, TopicNames(config.topics.prefix).predictions)
    assert message.key() == b"mine"


def test_events_of_many_threads_are_all_counted(config: Config) -> None:
    with Recorder("support-intents", config) as recorder:

        def serve() -> None:
            for _ in range(500):
                recorder.predict(QUESTION, SAID, model="m@1")

        threads = [threading.Thread(target=serve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (recorder.delivered, recorder.failed, recorder.dropped) == (2000, 0, 0)
    assert len(records(config, TopicNames(config.topics.prefix).predictions)) == 2000


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: r.predict(QUESTION, SAID, model="m@1", prediction_id=""), "0 characters"),
        (lambda r: r.predict(QUESTION, SAID, model="m@1", prediction_id="x" * 129), "129 characters"),
        (lambda r: r.predict(QUESTION, SAID, model="m@1", predicted_at=datetime(2026, 1, 1)), "time zone"),  # noqa: DTZ001
        (lambda r: r.outcome("p", {"intent": "a"}, observed_at=datetime(2026, 1, 1)), "time zone"),  # noqa: DTZ001
        (lambda r: r.predict({"text": object()}, SAID, model="m@1"), "inputs cannot be written as JSON"),
        (lambda r: r.predict({"text": "x" * 2_000_000}, SAID, model="m@1"), "too large"),
        (lambda r: r.outcome("p", {"intent": object()}), "values cannot be written as JSON"),
    ],
)
def test_misuse_is_refused_at_the_call(unreachable: Recorder, call: Any, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        call(unreachable)
    assert unreachable.buffered == 0


def test_without_a_broker_the_oldest_are_kept_and_each_refused_event_is_surfaced(
    unreachable: Recorder, lost: list[Undelivered]
) -> None:
    ids = [unreachable.predict(QUESTION, SAID, model="m@1", prediction_id=f"p{n}") for n in range(5)]
    assert ids == ["p0", "p1", "p2", "p3", "p4"]
    assert (unreachable.buffered, unreachable.dropped, unreachable.failed) == (3, 2, 0)
    assert [e.key for e in lost] == ["p3", "p4"]
    assert isinstance(lost[0].error, BufferFull) and b'"prediction_id":"p3"' in lost[0].value
    unreachable.close(timeout=0.1)
    assert (unreachable.buffered, unreachable.dropped, unreachable.failed) == (0, 2, 3)
    assert sorted(e.key for e in lost) == ["p0", "p1", "p2", "p3", "p4"]


def test_a_full_buffer_raises_for_who_asks_for_it() -> None:
    recorder = Recorder("support-intents", NOBODY, buffer_events=1, when_full="raise")
    recorder.outcome("p", {"intent": "a"})
    with pytest.raises(BufferFull, match="buffer holds 1 events"):
        recorder.outcome("p", {"intent": "a"})
    recorder.close(timeout=0.1)


def test_what_the_broker_does_not_take_in_time_is_given_up_and_surfaced(lost: list[Undelivered]) -> None:
    with Recorder("support-intents", NOBODY, on_error=lost.append, deliver_within_s=0.2) as recorder:
        recorder.predict(QUESTION, SAID, model="m@1", prediction_id="p")
        deadline = time.monotonic() + 20
        while not lost and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (recorder.failed, recorder.buffered) == (1, 0)
    assert lost[0].topic == "accrual.predictions"


def test_a_callback_that_fails_stops_no_reports() -> None:
    def broken(_lost: Undelivered) -> None:
        raise ValueError("mine")

    recorder = Recorder("support-intents", NOBODY, on_error=broken)
    for _ in range(3):
        recorder.outcome("p", {"intent": "a"})
    recorder.close(timeout=0.1)
    assert recorder.failed == 3


def test_events_wait_for_a_broker_that_comes_later(tmp_path: Path) -> None:
    from accrual.broker import DevelopmentBroker

    broker = DevelopmentBroker(tmp_path)
    running = broker.start()
    config = load_config(environ={}, kafka={"bootstrap_servers": running.bootstrap})
    try:
        create_topics(config)
        broker.stop()
        recorder = Recorder("support-intents", config)
        for n in range(100):
            recorder.predict(QUESTION, SAID, model="m@1", prediction_id=f"p{n}")
        assert (recorder.buffered, recorder.delivered) == (100, 0)
        broker.start(running.port)
        assert recorder.flush(60) == 0
        recorder.close()
        assert (recorder.delivered, recorder.failed, recorder.dropped) == (100, 0, 0)
        assert len(records(config, TopicNames("accrual").predictions)) == 100
    finally:
        broker.stop()


def test_a_closed_recorder_says_so(unreachable: Recorder) -> None:
    unreachable.close(timeout=0.1)
    unreachable.close()
    with pytest.raises(RecorderClosed):
        unreachable.outcome("p", {"intent": "a"})


def test_the_asyncio_recorder_delivers_and_leaves_the_loop_free(config: Config) -> None:
    async def serve() -> AsyncRecorder:
        async with AsyncRecorder("support-intents", config) as recorder:
            for _ in range(20):
                recorder.predict(QUESTION, SAID, model="m@1")
            assert await recorder.flush() == 0
        return recorder

    assert asyncio.run(serve()).delivered == 20

    async def blocked() -> int:
        """Ticks of the loop while a close waits in vain for a broker."""
        recorder = AsyncRecorder("support-intents", NOBODY)
        recorder.outcome("p", {"intent": "a"})
        closing = asyncio.ensure_future(recorder.close(0.5))
        ticks = 0
        while not closing.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(blocked()) > 5


def test_what_a_program_recorded_last_leaves_with_it(config: Config) -> None:
    program = """
from accrual import Recorder
recorder = Recorder("support-intents")
recorder.predict({"text": "last words"}, {"label": "a", "probabilities": {"a": 1}}, model="m@1", prediction_id="last")
"""
    subprocess.run([sys.executable, "-c", program], env={"PATH": "", **config.environment()}, check=True, timeout=60)
    [message] = records(config, TopicNames(config.topics.prefix).predictions)
    assert message.key() == b"last"


def test_the_public_names_are_there_and_importing_them_loads_no_engine() -> None:
    program = """
import sys, accrual
missing = [name for name in accrual.__all__ if not hasattr(accrual, name)]
engines = {"torch", "transformers", "faust", "duckdb", "rocksdict"} & set(sys.modules)
assert not missing and not engines, (missing, engines)
assert accrual.__all__ == sorted(accrual.__all__)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
