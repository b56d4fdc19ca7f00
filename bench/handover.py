"""How long each partition pauses when join workers come, go, and are started anew, while events keep flowing.

    python bench/handover.py                          100,000 pending predictions in each of 4 partitions, 3 rounds
    python bench/handover.py --pending 10000 --rounds 1        a quick look

It starts a development broker of its own in a temporary folder, fills the input, and starts a worker that joins it all.
Then, in each round: a second worker comes, goes (SIGTERM), comes back to the cache it left, is restarted (SIGTERM and
started at once), is killed and started at once, and goes. All the while predictions with their outcomes are sent; a
partition's pause is the longest time between two arrivals of its ground truth at a reader of committed records. (It
counts the 200 ms of a batch, and that events come at random moments.)
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
from machine import machine

from accrual.broker import DevelopmentBroker
from accrual.config import Config, load_config
from accrual.events import encode, new_prediction_id
from accrual.kafka import TopicNames, TopicPartition, consumer, create_topics, producer

STREAM = "support-intents"
INPUTS = {"text": "I still have not received my new card, I ordered over a week ago."}
OUTPUT = {"label": "card_arrival", "probabilities": {"card_arrival": 0.7, "card_linking": 0.3}}
PER_PARTITION_S = 50  # pairs of events sent while it is measured
SETTLE_S = 5.0
PATIENCE_S = 180.0


class Health(msgspec.Struct, frozen=True):
    """What a worker's /health says."""

    partitions: tuple[int, ...] = ()


class Worker:
    """A join worker with a folder of its own."""

    def __init__(self, config: Config, name: str, folder: Path) -> None:
        self._config = msgspec.structs.replace(config, state=str(folder / name))
        self._name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "streams", "worker", "--worker-id", self._name, "--web-port", str(self._port)],
            env={**os.environ, **self._config.environment()},
            stderr=subprocess.DEVNULL,
        )

    def end(self, how: signal.Signals) -> None:
        """Send it a signal, and return when it has ended."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()

    def health(self) -> Health:
        """What it says of itself."""
        try:
            with urlopen(f"http://127.0.0.1:{self._port}/health", timeout=1) as answer:
                return msgspec.json.decode(answer.read(), type=Health)
        except HTTPError as exc:
            return msgspec.json.decode(exc.read(), type=Health)
        except OSError:
            return Health()


class Arrivals:
    """When ground truth arrived, by partition; a thread of its own watches."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._moments: dict[int, list[float]] = defaultdict(list)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def pauses(self, since: float, until: float) -> list[float]:
        """The longest pause of each partition between these moments."""
        found = []
        for number in range(self._config.topics.partitions):
            moments = [since, *(m for m in self._moments[number] if since < m < until), until]
            found.append(max(after - before for before, after in pairwise(moments)))
        return found

    def all_since(self, moment: float) -> bool:
        """Whether something has arrived in every partition since then."""
        return all(
            self._moments[number] and self._moments[number][-1] > moment
            for number in range(self._config.topics.partitions)
        )

    def _watch(self) -> None:
        topic = TopicNames(self._config.topics.prefix).ground_truth
        with closing(consumer(self._config, "handover", **{"fetch.wait.max.ms": 20})) as reader:
            numbers = range(self._config.topics.partitions)
            reader.assign([TopicPartition(topic, number, 0) for number in numbers])
            while not self._over.is_set():
                for message in reader.consume(1000, 0.01):
                    if message.error() is None:
                        self._moments[message.partition() or 0].append(time.monotonic())


def main() -> None:
    """Fill, come, go, restart, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pending", type=int, default=100_000, help="predictions a partition (default: %(default)s)")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # broker and workers end with the bench
    pauses: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="accrual-bench-") as folder:
        broker = DevelopmentBroker(Path(folder) / "broker")
        kafka = {"bootstrap_servers": broker.start().bootstrap}
        config = load_config({}, kafka=kafka, topics={"prefix": "handover", "partitions": options.partitions})
        workers = [Worker(config, name, Path(folder)) for name in ("first", "second")]
        try:
            create_topics(config)
            _fill(config, options.pending * options.partitions)
            _measure(config, workers, options.rounds, pauses)
        finally:
            for worker in workers:
                worker.end(signal.SIGKILL)
            broker.stop()
    print(
        f"{options.pending:,} pending predictions in each of {options.partitions} partitions, {options.rounds} rounds\n"
    )
    print("| the second worker | pause of a partition, p50 | max |\n|---|---:|---:|")
    for what, seconds in pauses.items():
        print(f"| {what} | {median(seconds):.1f} s | {max(seconds):.1f} s |")
    print(f"\n{machine()}")


def _measure(config: Config, workers: list[Worker], rounds: int, pauses: dict[str, list[float]]) -> None:
    first, second = workers
    count = config.topics.partitions

    def restart(how: signal.Signals) -> Callable[[], None]:
        return lambda: (second.end(how), second.start())[1]

    first.start()
    with _flow(config), Arrivals(config) as arrivals:
        _until(lambda: arrivals.all_since(0.0))  # all that was sent before is joined, then
        for round_ in range(rounds):
            for what, act, share in (
                ("is added, with an empty disk" if not round_ else "is added, with an old cache", second.start, 2),
                ("is removed (SIGTERM)", lambda: second.end(signal.SIGTERM), count),
                ("is added, with the cache it left", second.start, 2),
                ("is restarted (SIGTERM, start)", restart(signal.SIGTERM), 2),
                ("is killed and started (SIGKILL, start)", restart(signal.SIGKILL), 2),
                ("is removed (SIGTERM)", lambda: second.end(signal.SIGTERM), count),
                ("nothing happens to it", lambda: time.sleep(SETTLE_S), count),
            ):
                since = time.monotonic()
                act()
                acted = time.monotonic()
                _until(lambda share=share: len(first.health().partitions) == share)  # type: ignore[misc]
                _until(lambda acted=acted: arrivals.all_since(acted))  # type: ignore[misc]
                time.sleep(SETTLE_S)
                pauses[what] += (found := arrivals.pauses(since, time.monotonic()))
                print(what, " ".join(f"{pause:.2f}" for pause in found), file=sys.stderr, flush=True)


@contextmanager
def _flow(config: Config) -> Iterator[None]:
    """Send predictions, each with its outcome, as long as the `with` block lasts."""
    over = threading.Event()

    def send() -> None:
        names = TopicNames(config.topics.prefix)
        client = producer(config)
        step = 1 / (PER_PARTITION_S * config.topics.partitions)
        due = time.monotonic()
        while not over.is_set():
            id_ = new_prediction_id()
            client.produce(names.predictions, _prediction(id_), id_.encode())
            client.produce(names.outcomes, _outcome(id_), id_.encode())
            client.poll(0)
            due += step
            time.sleep(max(0.0, due - time.monotonic()))
        client.flush(30)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _fill(config: Config, predictions: int) -> None:
    client = producer(config, **{"queue.buffering.max.messages": 1_000_000, "linger.ms": 50})
    topic = TopicNames(config.topics.prefix).predictions
    for _ in range(predictions):
        id_ = new_prediction_id()
        client.produce(topic, _prediction(id_), id_.encode())
        client.poll(0)
    client.flush(120)


def _prediction(id_: str) -> bytes:
    said = {"v": 1, "prediction_id": id_, "stream": STREAM, "model": f"{STREAM}@0", "predicted_at": datetime.now(UTC)}
    return encode({**said, "inputs": INPUTS, "output": OUTPUT})


def _outcome(id_: str) -> bytes:
    values = {"intent": "card_arrival"}
    return encode({"prediction_id": id_, "stream": STREAM, "observed_at": datetime.now(UTC), "values": values})


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing for {PATIENCE_S:.0f} s")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
