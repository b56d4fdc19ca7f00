"""One seed: its story is told to real workers while its faults happen to them, and the oracle judges what came out.

What fails leaves its logs, and a DuckDB file with all that was read and expected, in the seed's folder.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from accrual.broker import DevelopmentBroker
from accrual.config import Config, Kafka, Topics
from accrual.errors import BrokerUnavailable
from accrual.kafka import (
    KafkaError,
    Message,
    Producer,
    TopicNames,
    create_topics,
    delete_topics,
    partition_of,
    producer,
    read_to_end,
)
from tests.chaos.cluster import Cluster, Worker
from tests.chaos.faults import WORKERS, Fault, NotPossible, inject, plan
from tests.chaos.oracle import Record, Rules, Verdict, judge
from tests.chaos.story import BY_LOAN, HORIZON, LATE, ON_EXPIRY, PARTITIONS, Sending, contracts, story

PREDICTIONS = 4_000
HOURS_PER_SECOND = 2.0
SETTLED_WITHIN_S = 90.0
RULES = {
    stream: Rules(HORIZON * 3600, LATE[stream], None if expiry == "censored" else expiry)
    for stream, expiry in ON_EXPIRY.items()
} | {BY_LOAN: Rules(HORIZON * 3600, "count", "no", by_entity=True)}


@dataclass
class Seed:
    """What became of one seed. `recoveries`: kind and seconds; `skipped`: what this machine does not allow, and why.

    `broken` says why it came to no verdict.
    """

    number: int
    folder: Path
    verdict: Verdict = field(default_factory=lambda: Verdict(0, Counter(), []))
    broken: str = ""
    injected: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    ended: int = 0
    unstopped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether anything was lost, came twice or was wrong, or the judge never got to it."""
        return bool(self.broken) or not self.verdict.clean

    @property
    def again(self) -> str:
        """The command that repeats it."""
        return f"make chaos SEEDS=1 FROM={self.number}"

    def report(self) -> str:
        """What failed, the plan, and how to repeat it."""
        found = ", ".join(f"{times} {failure}" for failure, times in sorted(self.verdict.found.items()))
        return "\n".join(
            [
                f"seed {self.number}: {self.broken or found}",
                *(f"    {sample}" for sample in self.verdict.samples),
                "  its faults:",
                *(f"    {fault}" for fault in plan(self.number)),
                f"  logs: {self.folder}"
                + ("" if self.broken else ", all records and findings: judgement.duckdb there"),
                f"  again: {self.again}",
            ]
        )


class Recoveries:
    """Measures how long each fault keeps partitions from being joined: see docs/chaos.md for the definition."""

    def __init__(self, cluster: Cluster) -> None:
        self.measured: list[tuple[str, float]] = []
        self._cluster = cluster
        self._lock = threading.Lock()
        self._begun = 0
        self._active = 0

    def begin(self) -> None:
        """A fault begins."""
        with self._lock:
            self._begun += 1
            self._active += 1

    def end(self) -> bool:
        """It is over; whether it is alone."""
        with self._lock:
            self._active -= 1
            return not self._active

    def measure(self, kind: str, ended: float, until: float) -> None:
        """Wait for recovery. Forgets the measurement when another fault begins, or at the moment `until`."""
        begun = self._begun
        while time.monotonic() < until and self._begun == begun:
            if self._cluster.recovered_since(ended, PARTITIONS):
                self.measured.append((kind, time.monotonic() - ended))
                return
            time.sleep(0.1)


def run_seed(number: int, broker: DevelopmentBroker, port: int, folder: Path) -> Seed:
    """Tell the story of a seed to a group of workers, with its faults, and judge what came out."""
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "contracts").mkdir(parents=True)
    for stream, text in contracts().items():
        (folder / "contracts" / f"{stream}.yaml").write_text(text)
    config = Config(
        kafka=Kafka(bootstrap_servers=f"127.0.0.1:{port}"),
        topics=Topics(prefix=f"chaos-{number}-{uuid.uuid4().hex[:6]}", partitions=PARTITIONS),
        contracts=str(folder / "contracts"),
    )
    if broker.status() is None:
        broker.start(port)
    create_topics(config)
    seed = Seed(number, folder)
    with Cluster(broker, port, config, folder) as cluster:
        faults = plan(number)
        for name in WORKERS:
            worker = cluster.worker(name)
            if any((fault.lane, fault.kind) == (name, "disk") for fault in faults):
                cluster.small_disk(worker)
            worker.start()
        recoveries = Recoveries(cluster)
        beginning = time.monotonic()
        with ThreadPoolExecutor() as threads:
            lanes = [
                threads.submit(_suffer, cluster, [f for f in faults if f.lane == lane], beginning, seed, recoveries)
                for lane in sorted({fault.lane for fault in faults})
            ]
            telling = threads.submit(_tell, config, number)
            for lane in lanes:
                lane.result()
            telling.result()
        _eventually(lambda: _judge(config).clean, SETTLED_WITHIN_S)
        with ThreadPoolExecutor() as threads:
            stopped = threads.map(Worker.stop, cluster.workers.values())
            seed.unstopped = [name for name, well in zip(cluster.workers, stopped, strict=True) if not well]
        seed.verdict = _judge(config)
        seed.recoveries = recoveries.measured
        seed.ended = sum(worker.ended for worker in cluster.workers.values())
    seed.seconds = time.monotonic() - started
    if seed.failed:
        _judge(config, folder / "judgement.duckdb")
        shutil.copy(broker.log, folder)
        return seed
    delete_topics(config)
    if not seed.unstopped:
        shutil.rmtree(folder)
    return seed


def _suffer(cluster: Cluster, faults: list[Fault], beginning: float, seed: Seed, recoveries: Recoveries) -> None:
    """Inject the faults of one lane, each at its moment."""
    for n, fault in enumerate(faults):
        time.sleep(max(0.0, beginning + fault.at - time.monotonic()))
        recoveries.begin()
        try:
            ended = inject(cluster, fault)
            seed.injected[fault.kind] += 1
        except NotPossible as reason:
            seed.skipped[fault.kind] = str(reason)
            ended = None
        finally:
            alone = recoveries.end()
        if ended is not None and alone:
            last = n + 1 == len(faults)
            recoveries.measure(fault.kind, ended, ended + 60 if last else beginning + faults[n + 1].at)


def _tell(config: Config, number: int) -> None:
    """Send a seed's story, at the pace of its event time. Raises BrokerUnavailable when a record is not delivered."""
    told = story(number, PREDICTIONS)
    failed: list[str] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failed.append(error.str())

    client = producer(config, on_delivery=delivered, log_level=0)
    started = time.monotonic()
    for sending in told.events:
        time.sleep(max(0.0, started + sending.hour / HOURS_PER_SECOND - time.monotonic()))
        _send(config, client, sending)
    client.flush(60)
    astray = Counter[tuple[str, bytes | None, bytes | None]](
        (s.topic, s.key, s.value) for s in told.events if s.partition is not None
    )
    _eventually(lambda: not astray - _at_home(config), SETTLED_WITHIN_S)
    for part in (told.rest, told.tides, told.aftermath):
        for sending in part:
            _send(config, client, sending)
        client.flush(60)
    if failed:
        raise BrokerUnavailable(f"{len(failed)} records of the story were not delivered: {failed[0]}")


def _send(config: Config, client: Producer, sending: Sending) -> None:
    topic = getattr(TopicNames(config.topics.prefix), sending.topic)
    if sending.partition is None:
        client.produce(topic, sending.value, sending.key)
    else:
        client.produce(topic, sending.value, sending.key, sending.partition)
    client.poll(0)


def _at_home(config: Config) -> Counter[tuple[str, bytes | None, bytes | None]]:
    """The records that are in the partition of their key."""
    return Counter(
        (topic, record.key, record.value)
        for topic in ("predictions", "outcomes")
        for record in _records(config, topic)
        if record.key is not None and record.partition == partition_of(record.key, PARTITIONS)
    )


def _judge(config: Config, database: Path | None = None) -> Verdict:
    topics = {topic: _records(config, topic) for topic in ("predictions", "outcomes", "ground_truth", "dead_letters")}
    keys = {record.key for topic in ("predictions", "outcomes") for record in topics[topic] if record.key is not None}
    homes = {key: partition_of(key, PARTITIONS) for key in keys}
    return judge(topics, RULES, homes, config.topics.prefix, database)


def _records(config: Config, topic: str) -> list[Record]:
    """The committed records of a topic, as of now."""
    name = getattr(TopicNames(config.topics.prefix), topic)
    return [
        Record(m.partition() or 0, m.offset() or 0, m.timestamp()[1], m.key(), m.value())
        for m in read_to_end(config, name)
    ]


def _eventually(what: Callable[[], bool], seconds: float) -> None:
    """Return once it holds, or after `seconds`; a broker that is away is waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except BrokerUnavailable:
            pass  # it was killed, and comes back
        time.sleep(1)
