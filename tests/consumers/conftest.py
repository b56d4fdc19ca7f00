"""A world for the lake's tests: events and the ground truth they make, poured into a lake directly or through Kafka."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pytest

from accrual.config import Config, Kafka, Topics
from accrual.contract import Contract, load_contracts
from accrual.events import NULL, DeadLetter, GroundTruth, Outcome, Prediction, encode
from accrual.kafka import TopicNames, create_topics, partition_of, producer
from accrual.lake import Move, WritableLake, open_lake_for_writing
from consumers.rows import arrow_tables, readers

CONTRACT = """
stream: tickets
inputs: {text: {type: string}}
output: {classes: [low, high]}
outcome:
  values: {urgency: {type: string}}
label: {field: urgency}
horizon: 1d
on_expiry: low
late: dead_letter
disorder: 1h
training: {template: '{text}', window_rows: 50}
"""
STREAM = "tickets"
START = datetime(2025, 1, 1, tzinfo=UTC)
PARTITIONS = 2


class Record(NamedTuple):
    """A record with its place, as a consumer would hand it out."""

    to: str
    number: int
    at: int
    k: bytes | None
    v: bytes | None
    ms: int

    def topic(self) -> str:
        return self.to

    def partition(self) -> int:
        return self.number

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes | None:
        return self.k

    def value(self) -> bytes | None:
        return self.v

    def timestamp(self) -> tuple[int, int]:
        return 2, self.ms


class World:
    """Makes events and, as a perfect join would, their ground truth. One prediction a minute of event time."""

    def __init__(self, config: Config, seed: int = 11) -> None:
        self.config = config
        self.names = TopicNames(config.topics.prefix)
        self.contracts: dict[str, Contract] = load_contracts(Path(config.contracts))
        self.records: list[Record] = []
        self._ends: Counter[tuple[str, int]] = Counter()
        self._sent = 0
        self._random = random.Random(seed)

    def prediction(self, n: int, text: str = "It is down", prediction_id: str | None = None) -> Prediction:
        return Prediction(
            prediction_id=prediction_id or f"p-{n:06d}",
            stream=STREAM,
            model=f"{STREAM}@0",
            predicted_at=START + timedelta(minutes=n),
            inputs=msgspec.Raw(encode({"text": text})),
            output=msgspec.Raw(b'{"label":"low","probabilities":{"low":1.0}}'),
        )

    def outcome(self, p: Prediction, after: timedelta = timedelta(hours=3), urgency: str = "low") -> Outcome:
        values = msgspec.Raw(encode({"urgency": urgency}))
        return Outcome(
            prediction_id=p.prediction_id, stream=p.stream, observed_at=p.predicted_at + after, values=values
        )

    def ground_truth(self, p: Prediction, o: Outcome | None, revision: int = 1) -> GroundTruth:
        return GroundTruth(
            prediction_id=p.prediction_id,
            stream=p.stream,
            revision=revision if o else 0,
            status="labeled" if o else "expired",
            label=msgspec.json.decode(o.values)["urgency"] if o else "low",
            model=p.model,
            predicted_at=p.predicted_at,
            observed_at=o.observed_at if o else None,
            inputs=p.inputs,
            output=p.output,
            values=o.values if o else NULL,
            source=o.source if o else None,
        )

    def send(self, event: Prediction | Outcome | GroundTruth) -> Record:
        """One event into the topic of its kind."""
        kinds = {
            Prediction: self.names.predictions,
            Outcome: self.names.outcomes,
            GroundTruth: self.names.ground_truth,
        }
        return self.send_raw(kinds[type(event)], encode(event), event.prediction_id.encode())

    def send_raw(self, topic: str, value: bytes | None, key: bytes | None) -> Record:
        """Any bytes into any topic; the record's place is settled here and the same in Kafka."""
        shared = topic in (self.names.predictions, self.names.outcomes, self.names.ground_truth)
        partition = partition_of(key or b"", PARTITIONS) if shared else 0
        offset = self._ends[topic, partition]
        self._ends[topic, partition] += 1
        self._sent += 1
        record = Record(topic, partition, offset, key, value, 1_764_000_000_000 + self._sent)
        self.records.append(record)
        return record

    def refuse(self, record: Record, reason: str) -> None:
        """The dead letter of a record."""
        letter = DeadLetter(
            reason=reason,
            detail="",
            topic=record.to,
            partition=record.number,
            offset=record.at,
            key=record.k,
            value=record.v,
        )
        self.send_raw(self.names.dead_letters, encode(letter), record.k)

    def minutes(self, first: int, count: int) -> None:
        """`count` predictions from number `first` on: labeled, revised, expired, sent twice, broken or in conflict."""
        for n in range(first, first + count):
            p = self.prediction(n)
            self.send(p)
            chance = self._random.random()
            if chance < 0.1:
                self.send(self.ground_truth(p, None))
                continue
            o = self.outcome(p, urgency=self._random.choice(["low", "high"]))
            self.send(o)
            self.send(self.ground_truth(p, o))
            if chance < 0.2:
                second = self.outcome(p, timedelta(hours=9), "high")
                self.send(second)
                self.send(self.ground_truth(p, second, revision=2))
            elif chance < 0.3:
                self.send(p)
                self.send(o)
            elif chance < 0.35:
                self.refuse(self.send(self.prediction(n, "something else")), "conflicting_prediction")
            elif chance < 0.4:
                self.refuse(self.send(self.outcome(p, timedelta(hours=30), "high")), "late")
            elif chance < 0.45:
                self.refuse(self.send_raw(self.names.predictions, b"{broken", b"?"), "not_json")

    def let_time_pass(self, days: float = 3.0) -> None:
        """In every partition a prediction and an outcome so much later that everything before has matured."""
        latest = max(
            msgspec.json.decode(r.v, type=dict)["predicted_at"] for r in self.records if r.v and self._timed(r)
        )
        n = int((datetime.fromisoformat(latest) - START) / timedelta(minutes=1) + days * 1440)
        for partition in range(PARTITIONS):
            name = next(f"late-{partition}-{i}" for i in range(99) if _home(f"late-{partition}-{i}") == partition)
            p = self.prediction(n, prediction_id=name)
            o = self.outcome(p, timedelta(seconds=1))
            self.send(p)
            self.send(o)
            self.send(self.ground_truth(p, o))

    def pour(self, lake: WritableLake) -> dict[str, pa.Table]:
        """Everything sent so far into a lake, without Kafka; the tables it came as."""
        by_topic = readers(self.names, self.contracts)
        tables, _ = arrow_tables(self.records, by_topic)  # type: ignore[arg-type]
        at = lake.claim(dict.fromkeys(self._ends, 0))
        moves = [Move(*place, at[place], end) for place, end in self._ends.items()]
        assert lake.append(tables, moves)
        self.records.clear()
        return tables

    def ends(self) -> dict[tuple[str, int], int]:
        """The offset behind the last record of each topic-partition."""
        return dict(self._ends)

    def guard(self, lake: WritableLake) -> Move:
        """What a sink gives the sealer: a move of its own to where it is."""
        place = self.names.predictions, 0
        at = lake.claim({place: 0})[place]
        return Move(*place, at, at)

    def publish(self) -> None:
        """Everything sent so far into Kafka."""
        target = producer(self.config)
        for r in self.records:
            target.produce(r.to, r.v, r.k, r.number)
        assert target.flush(60) == 0
        self.records.clear()

    def _timed(self, record: Record) -> bool:
        return record.to == self.names.ground_truth


def _home(prediction_id: str) -> int:
    return partition_of(prediction_id.encode(), PARTITIONS)


def settings(folder: Path, prefix: str) -> Config:
    """A state folder and a contract; no broker."""
    (folder / "contracts").mkdir()
    (folder / "contracts" / "tickets.yaml").write_text(CONTRACT)
    return Config(
        topics=Topics(prefix=prefix, partitions=PARTITIONS),
        state=str(folder / "state"),
        contracts=str(folder / "contracts"),
    )


@pytest.fixture
def config(prefix: str, tmp_path: Path) -> Config:
    """The settings of one test."""
    return settings(tmp_path, prefix)


@pytest.fixture
def world(config: Config) -> World:
    """A world without Kafka: `pour` it."""
    return World(config)


@pytest.fixture
def kafka_world(config: Config, bootstrap: str) -> World:
    """A world with topics of its own on the broker: `publish` it."""
    reachable = msgspec.structs.replace(config, kafka=Kafka(bootstrap_servers=bootstrap))
    create_topics(reachable)
    return World(reachable)


@pytest.fixture
def lake(config: Config) -> Iterator[WritableLake]:
    """An empty lake, open for writing."""
    with open_lake_for_writing(config) as opened:
        yield opened


@pytest.fixture
def full_lake(world: World, lake: WritableLake) -> Callable[[int], WritableLake]:
    """Makes the lake hold so many minutes of a world in which everything has matured."""

    def fill(count: int) -> WritableLake:
        world.minutes(0, count)
        world.let_time_pass()
        world.pour(lake)
        return lake

    return fill
