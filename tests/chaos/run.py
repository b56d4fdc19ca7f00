"""The chaos suite: seeds, each a story told to real workers while faults happen to them, and judged by the oracle.

    python -m tests.chaos.run --seeds 10 --from 0        (or: make chaos SEEDS=10 FROM=0)

Exits with 1 when anything was lost, came twice or was wrong, naming the seed, its faults and the command that repeats
it; logs and a DuckDB file with all that was read and expected then stay in the seed's folder. See docs/chaos.md.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

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
from tests.chaos.cluster import Cluster
from tests.chaos.faults import KINDS, WORKERS, Fault, NotPossible, inject, plan
from tests.chaos.oracle import Record, Rules, Verdict, judge
from tests.chaos.story import HORIZON, LATE, ON_EXPIRY, PARTITIONS, Sending, contracts, story

PREDICTIONS = 4_000
HOURS_PER_SECOND = 2.0
SETTLED_WITHIN_S = 90.0
RULES = {
    stream: Rules(HORIZON * 3600, LATE[stream], None if expiry == "censored" else expiry)
    for stream, expiry in ON_EXPIRY.items()
}


@dataclass
class Seed:
    """What became of one seed. `recoveries`: kind and seconds; `skipped`: what this machine does not allow, and why."""

    number: int
    folder: Path
    verdict: Verdict
    injected: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    ended: int = 0
    unstopped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def report(self) -> str:
        """What failed, the plan, and how to repeat it."""
        found = ", ".join(f"{times} {failure}" for failure, times in sorted(self.verdict.found.items()))
        return "\n".join(
            [
                f"seed {self.number}: {found}",
                *(f"    {sample}" for sample in self.verdict.samples),
                "  its faults:",
                *(f"    {fault}" for fault in plan(self.number)),
                f"  logs and judgement.duckdb: {self.folder}",
                f"  again: make chaos SEEDS=1 FROM={self.number}",
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
    seed = Seed(number, folder, Verdict(0, Counter(), []))
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
        seed.unstopped = [name for name, worker in cluster.workers.items() if not worker.stop()]
        seed.verdict = _judge(config)
        seed.recoveries = recoveries.measured
        seed.ended = sum(worker.ended for worker in cluster.workers.values())
    seed.seconds = time.monotonic() - started
    if not seed.verdict.clean:
        _judge(config, folder / "judgement.duckdb")
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


@contextmanager
def own_broker(folder: Path) -> Iterator[tuple[DevelopmentBroker, int]]:
    """A broker that may be killed, and its port."""
    broker = DevelopmentBroker(folder)
    port = broker.start().port
    try:
        yield broker, port
    finally:
        broker.stop()


def summary(seeds: list[Seed]) -> Table:
    """What was injected, compared and found, over all seeds."""
    table = Table("", Column(justify="right"), "", title=f"{len(seeds)} seeds", show_header=False, title_justify="left")
    injected, found = Counter[str](), Counter[str]()
    skipped: dict[str, str] = {}
    for seed in seeds:
        injected += seed.injected
        found += seed.verdict.found
        skipped |= seed.skipped
    for kind, what in KINDS.items():
        table.add_row(f"fault: {kind}", str(injected[kind]), skipped.get(kind) or what)
    table.add_section()
    table.add_row("faults injected", str(injected.total()))
    table.add_row("rows compared", str(sum(seed.verdict.compared for seed in seeds)))
    for failure in ("lost", "duplicate", "wrong"):
        table.add_row(failure, str(found[failure]))
    table.add_section()
    table.add_row("workers that ended", str(sum(seed.ended for seed in seeds)), "by themselves, and were started again")
    table.add_row(
        "workers not stopped",
        str(sum(len(seed.unstopped) for seed in seeds)),
        "within 30 s of SIGTERM, or not with exit code 0",
    )
    table.add_section()
    for kind in (*KINDS, ""):
        times = sorted(s for seed in seeds for what, s in seed.recoveries if kind in ("", what))
        if times:
            p50, p95 = statistics.median(times), times[min(len(times) - 1, int(0.95 * len(times)))]
            shown = f"p50 {p50:4.1f} s, p95 {p95:4.1f} s, max {times[-1]:4.1f} s"
            table.add_row(f"recovery: {kind or 'all'}", str(len(times)), shown)
    return table


def main() -> None:
    """Run seeds, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one")
    parser.add_argument("--folder", type=Path, default=Path(".accrual/chaos"), help="for logs and state")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    folder = options.folder.absolute()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seeds: list[Seed] = []
    with (
        own_broker(folder / "broker") as (broker, port),
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task("chaos", total=options.seeds)
        for number in range(options.first, options.first + options.seeds):
            kinds = ", ".join(fault.kind for fault in plan(number))
            progress.update(task, description=f"seed {number}: {kinds}")
            seeds.append(run_seed(number, broker, port, folder / f"seed-{number}"))
            if not seeds[-1].verdict.clean:
                progress.console.print(seeds[-1].report(), highlight=False, markup=False)
            progress.advance(task)
    console.print(summary(seeds))
    if failed := [seed.number for seed in seeds if not seed.verdict.clean]:
        console.print(f"FAILED: seeds {', '.join(map(str, failed))}")
        sys.exit(1)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


if __name__ == "__main__":
    main()
