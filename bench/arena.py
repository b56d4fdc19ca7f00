"""Where contenders are run: a development broker of the bench's own, on a core of its own, and what is on it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic
from contenders import Contender, Launch
from measure import Worker, cores, cpu_seconds, on_core, peak_mib

from accrual.broker import DevelopmentBroker
from accrual.config import Config, load_config
from accrual.kafka import TopicNames, TopicPartition, consumer, create_topics

ROOT = Path(__file__).resolve().parent.parent
PARTITIONS = 4
LOOK_S = 0.2
STUCK_S = 180.0
SHORT_S = 2.0  # what is committed in one go, a fifth of a second of work, must be little beside it


@dataclass(frozen=True)
class Cost:
    """What a stretch of work cost: events, seconds of the worker's CPU, of the clock and of the broker's CPU.

    All of it counts the worker's start. `warm_per_cpu_s` and `rate` do not: they are events a second of the worker's
    CPU and of the clock in the second half of the work; the first is NaN when that half was too short to tell.
    `peak_mib` is the most memory so far.
    """

    events: int
    cpu_s: float
    wall_s: float
    broker_cpu_s: float
    peak_mib: float
    warm_per_cpu_s: float
    rate: float

    @property
    def per_cpu_s(self) -> float:
        """Events a second of the worker's CPU."""
        return self.events / self.cpu_s


class Arena:
    """A broker that lives as long as the `with` block, in a folder that goes with it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._broker = DevelopmentBroker(folder / "broker")
        self._broker_core, self._worker_core, self._own_core = cores()
        self._runs = 0
        self._inputs: set[str] = set()

    def __enter__(self) -> Arena:
        with on_core(self._broker_core):
            running = self._broker.start()
        self._kafka = {"bootstrap_servers": running.bootstrap}
        self._broker_pid = running.pid
        self._admin = AdminClient({"bootstrap.servers": running.bootstrap, "log_level": 0})
        return self

    def __exit__(self, *_: object) -> None:
        self._broker.stop()

    @property
    def layout(self) -> str:
        """Which core does what, for people."""
        if self._broker_core == self._worker_core:
            return "broker, worker and bench share the one core there is: figures of the clock say little"
        shared = " with the bench" if self._own_core == self._broker_core else ""
        return f"broker on core {self._broker_core}{shared}, worker alone on core {self._worker_core}"

    def inputs(self, prefix: str, partitions: int = PARTITIONS) -> Config:
        """Empty input topics under a prefix, as a configuration."""
        config = load_config(
            {}, kafka=self._kafka, topics={"prefix": prefix, "partitions": partitions}, state=str(self._folder)
        )
        names = TopicNames(prefix)
        self._inputs |= {names.predictions, names.outcomes}
        create_topics(config)
        return config

    def drop_inputs(self, config: Config) -> None:
        """Give the disk back."""
        names = TopicNames(config.topics.prefix)
        self._inputs -= {names.predictions, names.outcomes}
        self._delete_topics()

    def run(self, contender: Contender, config: Config) -> Run:
        """Prepare a run with empty output topics, no state and no offsets; nothing is started yet."""
        self._runs += 1
        self._delete_topics()
        create_topics(config)
        state = self._folder / f"run-{self._runs}"
        state.mkdir()
        launch = contender.launch(config, f"{contender.name}-{self._runs}", state)
        self._forget_group(launch.group)
        if launch.output and launch.output != TopicNames(config.topics.prefix).ground_truth:
            [made] = self._admin.create_topics([NewTopic(launch.output, PARTITIONS, 1)]).values()
            made.result(30)
        return Run(self, launch, config, state)

    def start(self, launch: Launch, log: Path) -> Worker:
        """Start a run's worker on its core."""
        return Worker(launch.argv, launch.env, ROOT, log, self._worker_core)

    def broker_cpu_s(self) -> float:
        """CPU seconds that the broker has used."""
        return cpu_seconds(self._broker_pid)

    def committed(self, group: str, config: Config) -> int:
        """How many input events a group has behind it, by its committed offsets."""
        return sum(self.places(group, config).values())

    def places(self, group: str, config: Config) -> dict[tuple[str, int], int]:
        """A group's committed offset on each input topic-partition; empty while it has none."""
        places = [
            TopicPartition(topic, number)
            for topic in _input_topics(config)
            for number in range(config.topics.partitions)
        ]
        try:
            asked = [ConsumerGroupTopicPartitions(group, places)]
            [answer] = self._admin.list_consumer_group_offsets(asked, request_timeout=5).values()
            return {(p.topic, p.partition): max(p.offset, 0) for p in answer.result().topic_partitions}
        except KafkaException:
            return {}  # the group is not there yet, or its coordinator

    def events(self, config: Config) -> int:
        """How many events the input topics hold."""
        with closing(consumer(config, "bench-ends")) as reader:
            return sum(
                reader.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
                for topic in _input_topics(config)
                for number in range(config.topics.partitions)
            )

    def _delete_topics(self) -> None:
        """All but the inputs and the broker's own."""
        there = self._admin.list_topics(timeout=10).topics
        gone = [name for name in there if name not in self._inputs and not name.startswith("__")]
        for deleted in (self._admin.delete_topics(gone) if gone else {}).values():
            deleted.result(30)
        _until(lambda: not set(gone) & set(self._admin.list_topics(timeout=10).topics), "topics are not deleted")

    def _forget_group(self, group: str) -> None:
        """Delete a group's offsets; a worker that has just ended is a member until its session times out."""

        def gone() -> bool:
            try:
                [deleted] = self._admin.delete_consumer_groups([group], request_timeout=5).values()
                deleted.result()
            except KafkaException as exc:
                return exc.args[0].name() == "GROUP_ID_NOT_FOUND"
            return True

        _until(gone, f"group {group} still has members")


class Run:
    """One contender at work on one set of inputs; may be started again after a stop, with the state it has."""

    def __init__(self, arena: Arena, launch: Launch, config: Config, state: Path) -> None:
        self.output = launch.output
        self._arena = arena
        self._launch = launch
        self._config = config
        self._state = state
        self._worker: Worker | None = None
        self._done = 0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self._state, ignore_errors=True)

    def start(self) -> None:
        """Start the worker."""
        self._worker = self._arena.start(self._launch, self._state.with_suffix(".log"))

    def stop(self) -> None:
        """Stop the worker, if it runs."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def drain(self) -> Cost:
        """Wait until all events there now are committed; what the worker has cost since it was started.

        Ends the bench when the worker ends, or commits nothing for `STUCK_S` seconds.
        """
        worker, arena = self._worker, self._arena
        assert worker is not None
        broker_cpu, total = arena.broker_cpu_s(), arena.events(self._config)
        before = done = self._done
        moved_at = time.monotonic()
        halfway: tuple[int, float, float] | None = None
        while done < total:
            time.sleep(LOOK_S)
            worker.check()
            now, done_before = time.monotonic(), done
            done = max(done, arena.committed(self._launch.group, self._config))
            if done > done_before:
                moved_at = now
                if halfway is None and done >= (before + total) / 2:
                    halfway = done, cpu_seconds(worker.pid), now
            elif now - moved_at > STUCK_S:
                stuck = f"{done} of {total} events are committed, and no more for {STUCK_S:.0f} s"
                raise SystemExit(f"{stuck}:\n{worker.last_words()}")
        self._done = done
        cpu, ended = cpu_seconds(worker.pid), time.monotonic()
        half, half_cpu, half_at = halfway or (done, cpu, ended)
        return Cost(
            events=total - before,
            cpu_s=cpu,
            wall_s=ended - worker.started_at,
            broker_cpu_s=arena.broker_cpu_s() - broker_cpu,
            peak_mib=peak_mib(worker.pid),
            warm_per_cpu_s=(done - half) / (cpu - half_cpu) if cpu - half_cpu >= SHORT_S else math.nan,
            rate=(done - half) / (ended - half_at) if done > half else total / (ended - worker.started_at),
        )


def _input_topics(config: Config) -> tuple[str, str]:
    names = TopicNames(config.topics.prefix)
    return names.predictions, names.outcomes


def _until(done: Callable[[], bool], problem: str, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"{problem} after {timeout_s:.0f} s")
        time.sleep(0.2)
