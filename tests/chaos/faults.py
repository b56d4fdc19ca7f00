"""What goes wrong, and when: the fault plan of a seed, and how each fault is injected.

A plan is a function of the seed alone. It has lanes: the faults of one lane follow each other, those of different lanes
may overlap. A lane is one worker, the broker, or workers that come and go.
"""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.chaos.cluster import DISK_BYTES, Cluster, Worker, free_of_state
from tests.chaos.story import PARTITIONS

WORKERS = ("first", "second")
BEGIN_S, END_S = 2.0, 24.0  # faults begin between these moments of a seed
LONGER_THAN_A_TRANSACTION_S = 16.5

KINDS = {
    "kill": "SIGKILL of a worker, mostly amid a transaction; started again after a moment",
    "freeze": "SIGSTOP of a worker for longer than a transaction may last, replaced by another, then SIGCONT",
    "broker": "SIGKILL of the broker, mostly amid a transaction; started again on its port",
    "churn": "another worker joins and leaves, again and again",
    "disk": "the disk of a worker's state is full for a while; it restarts on it",
    "clock": "a worker's wall clock jumps ahead and back by days",
    "delete": "a worker's state folder is deleted while it runs, or while it is down",
    "corrupt": "a file of a worker's RocksDB is damaged or cut off while it is down",
}


class Fault(NamedTuple):
    """One fault: `at` seconds after the start, of a kind, `seconds` long; `chance` decides its details."""

    lane: str
    at: float
    kind: str
    seconds: float
    chance: int

    def __str__(self) -> str:
        return f"{self.at:5.1f} s  {self.kind:8} {self.lane}, {self.seconds:.1f} s"


def plan(seed: int) -> list[Fault]:
    """The faults of a seed, by the moment they begin."""
    rng = random.Random(f"faults {seed}")
    faults: list[Fault] = []
    for lane in WORKERS:
        at = BEGIN_S
        while (at := at + rng.uniform(0.5, 7)) < END_S:
            kind = rng.choice(["kill", "kill", "freeze", "disk", "clock", "delete", "corrupt", "corrupt"])
            if kind == "freeze" and at > 10:
                continue  # a seed should not take much longer than its story
            seconds = rng.uniform(LONGER_THAN_A_TRANSACTION_S, 18) if kind == "freeze" else rng.uniform(0.0, 3.0)
            faults.append(Fault(lane, at, kind, seconds, rng.randrange(1 << 32)))
            at += seconds + 4  # it takes a worker a while to be back
    if rng.random() < 0.5:
        faults.append(
            Fault("broker", rng.uniform(BEGIN_S, END_S), "broker", rng.uniform(0.2, 4), rng.randrange(1 << 32))
        )
    if rng.random() < 0.4:
        faults.append(
            Fault("third", rng.uniform(BEGIN_S, END_S - 10), "churn", rng.uniform(6, 12), rng.randrange(1 << 32))
        )
    return sorted(faults, key=lambda fault: fault.at)


class NotPossible(Exception):
    """This machine does not allow the fault; the message says why."""


def inject(cluster: Cluster, fault: Fault) -> float:
    """Make it happen, and return when it is over, with that moment (monotonic). Raises NotPossible."""
    return _INJECT[fault.kind](cluster, fault, random.Random(fault.chance))


def _kill(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    worker = cluster.worker(fault.lane)
    _amid_a_transaction(cluster, worker.health().partitions, rng, worker.kill)
    time.sleep(fault.seconds)
    return _started(worker)


def _freeze(cluster: Cluster, fault: Fault, _rng: random.Random) -> float:
    """The replacement stays: the one that wakes up finds its place taken."""
    cluster.worker(fault.lane).freeze()
    cluster.worker(f"replacement-of-{fault.lane}").start()
    time.sleep(fault.seconds)
    cluster.worker(fault.lane).thaw()
    return time.monotonic()


def _broker(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    _amid_a_transaction(cluster, tuple(range(PARTITIONS)), rng, cluster.kill_broker)
    time.sleep(fault.seconds)
    cluster.start_broker()
    return time.monotonic()


def _churn(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    worker = cluster.worker(fault.lane)
    end = time.monotonic() + fault.seconds
    while time.monotonic() < end:
        worker.start()
        time.sleep(rng.uniform(1.5, 4))
        _end(worker, rng)
        time.sleep(rng.uniform(0, 2))
    return time.monotonic()


def fill(ballast: Path, step: int) -> None:
    """Write a file, `step` bytes at a time, until its disk has no room left."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(step)):
                pass
        except OSError:
            pass  # full, as it should be


def _disk(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    worker = cluster.worker(fault.lane)
    if not worker.state.is_mount():
        raise NotPossible("a small disk cannot be mounted: that needs root and the right to mount")
    ballast = worker.state / "ballast"
    fill(ballast, DISK_BYTES // 64)
    time.sleep(fault.seconds / 2)
    if rng.random() < 0.7:
        _end(worker, rng)
        worker.start()
    time.sleep(fault.seconds / 2 + 2)
    ballast.unlink()
    return time.monotonic()


def _clock(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    """The monotonic clock stays as it is: that is what a jump of the wall clock is."""
    library = faketime_library()
    if library is None:
        raise NotPossible("libfaketime is not installed (`pip install libfaketime`, or the system's package)")
    worker = cluster.worker(fault.lane)
    clock = worker.folder / "clock"
    clock.write_text(f"{rng.uniform(-3, 3):+.3f}d\n")
    worker.kill()
    worker.start(
        {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_CACHE_DURATION": "1",
        }
    )
    for _ in range(2):
        time.sleep(fault.seconds / 2 + 2)
        clock.write_text(f"{rng.uniform(-3, 3):+.3f}d\n")
    worker.kill()
    return _started(worker)


def _delete(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    worker = cluster.worker(fault.lane)
    if rng.random() < 0.5:
        free_of_state(worker)
        time.sleep(fault.seconds)
        return time.monotonic()
    _end(worker, rng)
    free_of_state(worker)
    time.sleep(fault.seconds)
    return _started(worker)


def _corrupt(cluster: Cluster, fault: Fault, rng: random.Random) -> float:
    """A clean stop writes the cache to disk, a kill leaves only what was written before: both are damaged."""
    worker = cluster.worker(fault.lane)
    _end(worker, rng)
    files = sorted(
        path for path in worker.state.glob("join/*/*/*/*") if path.suffix == ".sst" or path.name.startswith("MANIFEST")
    )
    for path in rng.sample(files, min(len(files), 3)):
        damage(path, rng)
    time.sleep(fault.seconds)
    return _started(worker)


def damage(path: Path, rng: random.Random) -> None:
    """Cut the file off somewhere, or change some of its bytes."""
    content = bytearray(path.read_bytes())
    if not content or rng.random() < 0.4:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
        return
    for _ in range(20):
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)


def faketime_library() -> Path | None:
    """The library that shifts a process's wall clock: that of PyPI's `libfaketime`, or the system's."""
    found = importlib.util.find_spec("libfaketime")
    places = [Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"] if found and found.origin else []
    places += Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return next((place for place in places if place.exists()), None)


def _amid_a_transaction(
    cluster: Cluster, partitions: tuple[int, ...], rng: random.Random, strike: Callable[[], None]
) -> None:
    """Mostly strike some milliseconds into a transaction: that is where a commit can be torn."""
    if rng.random() < 0.2:
        strike()
        return
    with cluster.amid_a_transaction(partitions):
        time.sleep(rng.choice([0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.02)]))
        strike()


def _end(worker: Worker, rng: random.Random) -> None:
    """Cleanly or not; a worker that does not end on SIGTERM is killed."""
    if rng.random() < 0.5:
        worker.stop()
    else:
        worker.kill()


def _started(worker: Worker) -> float:
    moment = time.monotonic()
    worker.start()
    return moment


_INJECT: dict[str, Callable[[Cluster, Fault, random.Random], float]] = {
    "kill": _kill,
    "freeze": _freeze,
    "broker": _broker,
    "churn": _churn,
    "disk": _disk,
    "clock": _clock,
    "delete": _delete,
    "corrupt": _corrupt,
}
