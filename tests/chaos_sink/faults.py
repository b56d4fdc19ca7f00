"""What goes wrong for a sink, and when: the fault plan of a seed, and how each fault is injected."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from accrual.contract import Contract
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_verify import DAMAGED, DataFile, data_files, verify
from consumers.refill import refill
from tests.chaos.faults import fill
from tests.chaos_sink.stand import DISK_BYTES, Stand

BEGIN_S, END_S = 2.5, 11.0  # faults begin between these moments of a seed
_PATIENCE_S = 3.0

KINDS = {
    "kill": "SIGKILL of a sink at any moment",
    "kill-file": "SIGKILL of a sink up to 10 ms after a Parquet file appears",
    "kill-catalog": "SIGKILL of the sink up to 5 ms after the SQLite catalog's log changes",
    "postgres": "SIGKILL of PostgreSQL, all its processes; started again",
    "store": "SIGKILL of the S3 server; started again",
    "disk": "the disk of the Parquet files is full for a while",
    "locked": "another process holds the SQLite catalog: as a reader, or for itself alone",
    "truncated": "power loss: the sinks are killed, and up to 3 of the newest files cut off or gone; verify and repair",
}
EMBEDDED = ("kill", "kill-file", "kill-catalog", "disk", "locked", "truncated")
PRODUCTION = ("kill", "kill-file", "postgres", "store", "truncated")


class Fault(NamedTuple):
    """One fault: `at` seconds after the start, of a kind, `seconds` long; `chance` decides its details."""

    at: float
    kind: str
    seconds: float
    chance: int

    def __str__(self) -> str:
        return f"{self.at:5.1f} s  {self.kind}, {self.seconds:.1f} s"


class Plan(NamedTuple):
    """What happens in a seed. `production`: two sinks on PostgreSQL and S3, not one on SQLite and a folder."""

    production: bool
    faults: list[Fault]


class NotHealedError(Exception):
    """Damage to files was not found, or not healed; the message says which."""


class NotPossibleError(Exception):
    """This machine does not allow the fault; the message says why."""


def plan(seed: int) -> Plan:
    """The faults of a seed, by the moment they begin: a function of the seed alone."""
    rng = random.Random(f"sink faults {seed}")
    production = rng.random() < 0.4
    faults: list[Fault] = []
    at = BEGIN_S
    while (at := at + rng.uniform(0.3, 2.0)) < END_S:
        kind = rng.choice(PRODUCTION if production else EMBEDDED)
        seconds = rng.uniform(0.0, 1.5)
        faults.append(Fault(at, kind, seconds, rng.randrange(1 << 32)))
        at += seconds + rng.uniform(0.0, 2.5)
    return Plan(production, faults)


def inject(stand: Stand, contracts: dict[str, Contract], fault: Fault) -> float:
    """Make it happen, and return when it is over, with that moment (monotonic).

    Raises NotPossibleError, NotHealedError.
    """
    rng = random.Random(fault.chance)
    if fault.kind == "truncated":
        _power_loss(stand, contracts, rng)
    else:
        _INJECT[fault.kind](stand, fault, rng)
    return time.monotonic()


def _kill(stand: Stand, fault: Fault, rng: random.Random) -> None:
    sink = rng.choice(stand.sinks)
    sink.kill()
    time.sleep(fault.seconds)
    sink.start()


def _kill_file(stand: Stand, fault: Fault, rng: random.Random) -> None:
    before = stand.parquet_files()
    _wait(lambda: not stand.parquet_files() <= before)
    time.sleep(rng.uniform(0, 0.01))
    _kill(stand, fault, rng)


def _kill_catalog(stand: Stand, fault: Fault, rng: random.Random) -> None:
    catalog = Path(stand.config.lake_catalog.removeprefix("sqlite:"))
    log = catalog.with_name(catalog.name + "-wal")

    def now() -> tuple[int, int]:
        try:
            found = log.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_size, found.st_mtime_ns

    before = now()
    _wait(lambda: now() != before)
    time.sleep(rng.uniform(0, 0.005))
    _kill(stand, fault, rng)


def _postgres(stand: Stand, fault: Fault, _rng: random.Random) -> None:
    assert stand.postgres is not None
    stand.postgres.kill()
    time.sleep(fault.seconds)
    stand.postgres.start()


def _store(stand: Stand, fault: Fault, _rng: random.Random) -> None:
    assert stand.store is not None
    stand.store.kill()
    time.sleep(fault.seconds)
    stand.store.start()


def _disk(stand: Stand, fault: Fault, _rng: random.Random) -> None:
    if not stand.data.is_mount():
        raise NotPossibleError("a small disk cannot be mounted: that needs root and the right to mount")
    ballast = stand.data / "ballast"
    fill(ballast, DISK_BYTES // 64)
    time.sleep(fault.seconds + 1.0)
    ballast.unlink()


def _locked(stand: Stand, fault: Fault, rng: random.Random) -> None:
    catalog = stand.config.lake_catalog.removeprefix("sqlite:")
    if not Path(catalog).exists():
        return
    with closing(sqlite3.connect(catalog, timeout=10, isolation_level=None)) as other:
        if rng.random() < 0.5:
            other.execute("begin")
            other.execute("select count(*) from ducklake_snapshot").fetchall()
        else:
            other.execute("begin immediate")
        time.sleep(fault.seconds + 1.0)
        other.execute("rollback")


def _power_loss(stand: Stand, contracts: dict[str, Contract], rng: random.Random) -> None:
    for sink in stand.sinks:
        sink.kill()
    files: list[DataFile] = []
    if _has_lake(stand):
        with open_lake(stand.config) as lake:
            known = [file for file in data_files(lake) if file.id is not None]
        newest = sorted(known, key=lambda file: (file.snapshot, file.path))[-6:]
        files = rng.sample(newest, min(len(newest), rng.randint(1, 3)))
    for file in files:
        path = stand.data / file.path
        if rng.random() < 0.2:
            path.unlink()
        else:
            os.truncate(path, rng.randrange(file.bytes))
    if files:
        _heal(stand, contracts, {file.path for file in files})
    for sink in stand.sinks:
        sink.start()


def _heal(stand: Stand, contracts: dict[str, Contract], hurt: set[str]) -> None:
    with open_lake_for_writing(stand.config) as lake:
        damaged = [one for one in verify(lake, stand.config, data_files(lake)) if one.state in DAMAGED]
        if {one.file.path for one in damaged} != hurt:
            raise NotHealedError(f"verify found {[one.file.path for one in damaged]}, damaged were {sorted(hurt)}")
        done = refill(stand.config, contracts, lake, damaged)
        if left := [one for one in done if one.why]:
            raise NotHealedError(f"not written again: {left}")
        if left_over := [one for one in verify(lake, stand.config, data_files(lake)) if one.state in DAMAGED]:
            raise NotHealedError(f"still damaged: {left_over}")


def _has_lake(stand: Stand) -> bool:
    if stand.store is not None:
        return bool(stand.parquet_files())
    return Path(stand.config.lake_catalog.removeprefix("sqlite:")).exists() and bool(stand.parquet_files())


def _wait(what: Callable[[], bool]) -> None:
    """Return as soon as it holds, or when patience is over."""
    until = time.monotonic() + _PATIENCE_S
    while not what() and time.monotonic() < until:
        time.sleep(0.001)


_INJECT: dict[str, Callable[[Stand, Fault, random.Random], None]] = {
    "kill": _kill,
    "kill-file": _kill_file,
    "kill-catalog": _kill_catalog,
    "postgres": _postgres,
    "store": _store,
    "disk": _disk,
    "locked": _locked,
}
