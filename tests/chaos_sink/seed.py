"""One seed: records come in at a steady pace, real sinks take them into a lake, faults happen, and the lake is judged.

The judge compares each row with the JSON of the record it stands for, and then has the audit balance the books.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from accrual.config import Config, Kafka, Lake, Topics
from accrual.errors import AccrualError
from accrual.kafka import create_topics, delete_topics
from accrual.lake import open_lake
from consumers.audit import audit_when_settled
from consumers.recompute import EARLIEST, LATEST, Scope
from tests.chaos_sink.faults import NotHealedError, NotPossibleError, inject, plan
from tests.chaos_sink.stand import ObjectStore, Postgres, Sink, Stand, production, small_disk
from tests.consumers.conftest import CONTRACT, PARTITIONS, Record, World

CHUNKS, CHUNK_MINUTES, CHUNK_S = 40, 15, 0.3
SETTLED_WITHIN_S = 90.0
_TABLES = ("predictions", "outcomes", "ground_truth_history", "dead_letters")

Key = tuple[str, str, int, int]


@dataclass
class Seed:
    """What became of one seed. `recoveries`: kind and seconds; `broken`: why it has no verdict, or what is amiss."""

    number: int
    folder: Path
    production: bool = False
    broken: str = ""
    injected: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, str] = field(default_factory=dict)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    compared: int = 0
    found: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    ended: int = 0
    unstopped: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether anything was lost, came twice or was wrong, the books do not balance, or damage was not healed."""
        return bool(self.broken) or bool(self.found.total())

    def report(self) -> str:
        """What failed, the plan, and how to repeat it."""
        found = ", ".join(f"{times} {failure}" for failure, times in sorted(self.found.items()))
        shape = "PostgreSQL and S3, two sinks" if self.production else "SQLite and a folder, one sink"
        return "\n".join(
            [
                f"seed {self.number} ({shape}): {self.broken or found}",
                *(f"    {sample}" for sample in self.samples[:10]),
                "  its faults:",
                *(f"    {fault}" for fault in plan(self.number).faults),
                f"  logs: {self.folder}",
                f"  again: make chaos-sink SEEDS=1 FROM={self.number}",
            ]
        )


def run_seed(number: int, bootstrap: str, folder: Path, postgres: Postgres | None, store: ObjectStore | None) -> Seed:
    """Run a seed; one whose plan asks for production and gets no servers runs on SQLite and says so."""
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "contracts").mkdir(parents=True)
    (folder / "contracts" / "tickets.yaml").write_text(CONTRACT)
    name = f"chaos-sink-{number}-{uuid.uuid4().hex[:6]}"
    config = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=name, partitions=PARTITIONS),
        lake=Lake(data=str(folder / "data")),
        state=str(folder / "state"),
        contracts=str(folder / "contracts"),
    )
    seed = Seed(number, folder)
    faults = plan(number)
    data = folder / "data"
    seed.production = faults.production and postgres is not None and store is not None
    if seed.production:
        assert postgres is not None
        assert store is not None
        config = production(config, name, postgres, store)
        data = store.folder / name / "lake"
    elif any(fault.kind == "disk" for fault in faults.faults):
        small_disk(data)
    create_topics(config)
    world = World(config, seed=number)
    sinks = [Sink(config, folder / f"sink-{n}.log") for n in range(2 if seed.production else 1)]
    sent: list[Record] = []
    with Stand(config, data, sinks, *((postgres, store) if seed.production else (None, None))) as stand:
        for sink in sinks:
            sink.start()
        telling = threading.Thread(target=_tell, args=(world, sent), name="telling")
        beginning = time.monotonic()
        telling.start()
        try:
            _suffer(stand, world, seed, beginning)
        except (NotHealedError, AccrualError) as exc:
            seed.broken = f"{type(exc).__name__}: {exc}"
        telling.join()
        until = time.monotonic() + SETTLED_WITHIN_S
        expected = _expected(world, sent)
        while not seed.broken and not _judge(config, expected, seed) and time.monotonic() < until:
            time.sleep(0.5)
        seed.unstopped = sum(not sink.stop() for sink in sinks)
        seed.ended = sum(sink.ended for sink in sinks)
        if not seed.broken:
            _judge(config, expected, seed)
            found = audit_when_settled(config, world.contracts, Scope(None, EARLIEST, LATEST))
            if not found.balanced:
                seed.broken = f"the audit does not balance: {found.differences[:5]}, {found.balances}, {found.outcomes}"
    delete_topics(config)
    seed.seconds = time.monotonic() - started
    if not seed.failed and not seed.ended and not seed.unstopped:
        shutil.rmtree(folder)
        shutil.rmtree(data, ignore_errors=True)
    return seed


def _tell(world: World, sent: list[Record]) -> None:
    """Send records at a steady pace, and at last some from so much later that all others have matured."""
    started = time.monotonic()
    for n in range(CHUNKS):
        time.sleep(max(0.0, started + n * CHUNK_S - time.monotonic()))
        world.minutes(n * CHUNK_MINUTES, CHUNK_MINUTES)
        if n == CHUNKS - 1:
            world.let_time_pass()
        sent += world.records
        world.publish()


def _suffer(stand: Stand, world: World, seed: Seed, beginning: float) -> None:
    """Inject the faults, each at its moment or as soon as the one before is over."""
    faults = [fault for fault in plan(seed.number).faults if seed.production or fault.kind not in ("postgres", "store")]
    for n, fault in enumerate(faults):
        time.sleep(max(0.0, beginning + fault.at - time.monotonic()))
        try:
            ended = inject(stand, world.contracts, fault)
        except NotPossibleError as reason:
            seed.skipped[fault.kind] = str(reason)
            continue
        seed.injected[fault.kind] += 1
        until = beginning + faults[n + 1].at if n + 1 < len(faults) else ended + 60
        _measure(stand.config, world, seed, fault.kind, ended, until)


def _measure(config: Config, world: World, seed: Seed, kind: str, ended: float, until: float) -> None:
    """How long until all that was sent before the fault was over is in the lake; forgotten if it is not by `until`."""
    ends = world.ends()
    while time.monotonic() < until:
        try:
            with open_lake(config) as lake:
                at = {(r["topic"], r["partition"]): r["next_offset"] for r in lake.rows("from offsets")}
        except AccrualError:
            at = {}
        if all(at.get(place, 0) >= end for place, end in ends.items()):
            seed.recoveries.append((kind, time.monotonic() - ended))
            return
        time.sleep(0.2)


def _expected(world: World, sent: list[Record]) -> dict[Key, Any]:
    """What the lake must say of each record, by table and place."""
    names, rows = world.names, {}
    for record in sent:
        assert record.v is not None
        if record.v == b"{broken":
            continue  # its dead letter stands for it
        event = msgspec.json.decode(record.v)
        place = record.to, record.number, record.at
        if record.to == names.predictions:
            rows["predictions", *place] = event["prediction_id"], event["model"], event["inputs"]
        elif record.to == names.outcomes:
            rows["outcomes", *place] = event["prediction_id"], event["values"]
        elif record.to == names.ground_truth:
            known = event["prediction_id"], event["revision"], event["status"], event["label"], event.get("values")
            rows["ground_truth_history", *place] = known
        else:
            rows["dead_letters", event["topic"], event["partition"], event["offset"]] = event["reason"]
    return rows


def _found(config: Config, world_names: dict[str, str]) -> list[tuple[Key, Any]]:
    """What the lake says, row by row."""
    rows: list[tuple[Key, Any]] = []
    decode = msgspec.json.decode
    with open_lake(config) as lake:
        for table in _TABLES:
            for r in lake.rows(f"from {table}"):
                said: Any
                if table == "predictions":
                    said = r["prediction_id"], r["model"], decode(r["inputs"])
                elif table == "outcomes":
                    said = r["prediction_id"], decode(r["values"])
                elif table == "ground_truth_history":
                    values = None if r["values"] is None else decode(r["values"])
                    said = r["prediction_id"], r["revision"], r["status"], r["label"], values
                else:
                    said = r["reason"]
                topic = r["topic"] if table == "dead_letters" else world_names[table]
                rows.append(((table, topic, r["partition"], r["offset"]), said))
    return rows


def _judge(config: Config, expected: dict[Key, Any], seed: Seed) -> bool:
    """Compare all rows with all records; whether they are the same."""
    prefix = config.topics.prefix
    names = {
        "predictions": f"{prefix}.predictions",
        "outcomes": f"{prefix}.outcomes",
        "ground_truth_history": f"{prefix}.ground-truth",
    }
    try:
        rows = _found(config, names)
    except AccrualError as exc:
        seed.found, seed.samples = Counter(lost=len(expected)), [str(exc)]
        return False
    times = Counter(key for key, _ in rows)
    seed.compared = len(rows)
    lost = [f"lost: {key}" for key in expected if key not in times]
    twice = [f"duplicate: {key}" for key, n in times.items() if n > 1 or key not in expected]
    wrong = [f"wrong: {key} {said}" for key, said in rows if key in expected and expected[key] != said]
    seed.found = Counter(lost=len(lost), duplicate=len(twice), wrong=len(wrong))
    seed.samples = [*lost, *twice, *wrong]
    return not seed.found.total()
