"""How many events the join worker handles a second of its own CPU, exactly once, beside a loop that only reads them.

    python bench/join.py [--predictions 200000]

Needs a broker at `kafka.bootstrap_servers` (`accrual broker start`); makes topics of its own and leaves them. Half the
events are predictions, half outcomes; 1% come twice. The baseline is the least any worker must do: consume the same
records in batches and decode them with the same checks. The output is checked: each id labeled exactly once.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from machine import machine

from accrual.config import Config, load_config
from accrual.contract import load_contracts
from accrual.events import Outcome, Prediction, decode_ground_truth, encode, read_outcome, read_prediction
from accrual.kafka import OFFSET_BEGINNING, TopicNames, TopicPartition, consumer, create_topics, producer, read_to_end

INPUTS = msgspec.Raw(encode({"text": "I still have not received my new card, I ordered over a week ago."}))
OUTPUT = msgspec.Raw(encode({"label": "card_arrival", "probabilities": {f"intent_{n}": 0.25 for n in range(4)}}))
VALUES = msgspec.Raw(encode({"intent": "card_arrival"}))
START = datetime(2026, 2, 1, tzinfo=UTC)


def main() -> None:
    """Produce, read with the baseline, join with a worker process, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=200_000, help="and as many outcomes (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        config = load_config(state=state, topics={"prefix": f"bench-{uuid.uuid4().hex[:8]}"})
        create_topics(config)
        events = _produce(config, arguments.predictions)
        baseline_cpu = _read_only(config, events)
        cpu, wall, resident = _join(config, arguments.predictions)
    print(f"{'':22}{'events/CPU-s':>14}{'CPU s':>9}{'wall s':>9}{'RSS MiB':>9}")
    print(f"{'join worker':22}{events / cpu:14,.0f}{cpu:9.1f}{wall:9.1f}{resident:9.0f}")
    print(f"{'read and decode only':22}{events / baseline_cpu:14,.0f}{baseline_cpu:9.1f}")
    print(f"ratio {baseline_cpu / cpu:.2f}; {events} events, {arguments.predictions} ids, each labeled exactly once")
    print(machine())


def _produce(config: Config, predictions: int) -> int:
    names = TopicNames(config.topics.prefix)
    client = producer(config, **{"queue.buffering.max.messages": 1_000_000, "linger.ms": 50})
    sent = 0
    for number in range(predictions):
        prediction_id = f"{config.topics.prefix}-{number:09d}"
        moment = START + timedelta(milliseconds=number)
        prediction = Prediction(
            prediction_id=prediction_id,
            stream="support-intents",
            model="support-intents@0",
            predicted_at=moment,
            inputs=INPUTS,
            output=OUTPUT,
        )
        outcome = Outcome(
            prediction_id=prediction_id,
            stream="support-intents",
            observed_at=moment + timedelta(hours=1),
            values=VALUES,
        )
        for _ in range(2 if number % 100 == 0 else 1):
            client.produce(names.predictions, encode(prediction), prediction_id.encode())
            client.produce(names.outcomes, encode(outcome), prediction_id.encode())
            sent += 2
        if number % 10_000 == 0:
            client.poll(0)
    client.flush(120)
    return sent


def _read_only(config: Config, events: int) -> float:
    names = TopicNames(config.topics.prefix)
    contracts = load_contracts(Path(config.contracts))
    reader = consumer(config, f"{config.topics.prefix}.baseline")
    reader.assign(
        [
            TopicPartition(topic, partition, OFFSET_BEGINNING)
            for topic in (names.predictions, names.outcomes)
            for partition in range(config.topics.partitions)
        ]
    )
    started, seen = time.process_time(), 0
    while seen < events:
        for message in reader.consume(20_000, 1.0):
            read = read_prediction if message.topic() == names.predictions else read_outcome
            read(message.value(), message.key(), message.timestamp()[1], contracts)
            seen += 1
    cpu = time.process_time() - started
    reader.close()
    return cpu


def _join(config: Config, predictions: int) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak resident MiB of one worker from its start to the last row it owes."""
    started = time.monotonic()
    worker = subprocess.Popen(
        [sys.executable, "-m", "streams", "worker"], env={**os.environ, **config.environment()}, start_new_session=True
    )
    topic = TopicNames(config.topics.prefix).ground_truth
    deadline = started + 600
    while (rows := sum(1 for _ in read_to_end(config, topic, 120))) < predictions:
        if time.monotonic() > deadline or worker.poll() is not None:
            raise SystemExit(f"the worker stopped at {rows} of {predictions} rows")
        time.sleep(1.0)
    wall = time.monotonic() - started
    worker.send_signal(signal.SIGTERM)
    worker.wait(30)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    ids = [decode_ground_truth(message.value() or b"").prediction_id for message in read_to_end(config, topic, 120)]
    if len(ids) != predictions or len(set(ids)) != predictions:
        raise SystemExit(f"wrong: {len(ids)} rows of {len(set(ids))} ids; expected {predictions}, each once")
    return used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
