"""How many records the sink puts into the lake a second of one core, and how soon they are there.

    python bench/sink.py                                               a backlog of 1M predictions and 1M outcomes, then
                                                                       10,000 records/s for 40 s; 3 rounds
    python bench/sink.py --predictions 100000 --seconds 10 --rounds 1  a quick look

It starts a development broker of its own, on a core of its own, in a temporary folder; the sink gets another core. In
each round every contender takes in the same records, from its start to the last commit, one after the other: Accrual's
sink (SQLite catalog, local files); `peers/parquet_writer.py`, which writes the same records to Parquet files and
commits the offsets after: no catalog, no checks, at least once; and Quix Streams with its Parquet file sink, at least
once too (`--only` chooses). Freshness is from the append of a record in the broker
to the commit it is in, of the records that came while the rate was steady. The table is in Markdown, medians over the
rounds.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import msgspec
from arena import Arena
from check import records
from contenders import HERE, Launch
from load import STEP, Load, produce
from machine import machine
from measure import Worker, cpu_seconds, peak_mib, percentile
from peers.quix import run as quix

from accrual.config import Config, load_config
from accrual.errors import LakeUnavailable
from accrual.kafka import TopicNames
from accrual.lake import open_lake

LOOK_S = 0.1
STUCK_S = 180.0
SETTLE_S = 5


@dataclass(frozen=True)
class Figures:
    """Of one run. `warm_per_cpu_s` is of the second half of the backlog."""

    contender: str
    records: int
    cpu_s: float
    per_cpu_s: float
    warm_per_cpu_s: float
    wall_s: float
    fresh_p50_s: float
    fresh_p99_s: float
    cpu_share: float
    peak_mib: float
    files: int
    file_kib: float


class Committed:
    """What of a contender's input is committed, by topic-partition, as it goes up: [(when, up to this offset), ...]."""

    def __init__(self, look: Callable[[], dict[tuple[str, int], int]]) -> None:
        self._look = look
        self._seen: dict[tuple[str, int], tuple[list[int], list[float]]] = {}

    def look(self) -> int:
        """Look once; how many records are committed."""
        now = time.time()
        found = self._look()
        for place, end in found.items():
            ends, moments = self._seen.setdefault(place, ([], []))
            if not ends or end > ends[-1]:
                ends.append(end)
                moments.append(now)
        return sum(found.values())

    def moment(self, place: tuple[str, int], offset: int) -> float:
        """When this record was first seen committed; a look later than it was at most."""
        ends, moments = self._seen[place]
        return moments[bisect.bisect_right(ends, offset)]


def main() -> None:
    """Run what was asked for and print the table."""
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    backlog = Load(_whole_steps(given.predictions), _whole_steps(given.predictions))
    found: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="accrual-bench-", dir=given.folder) as folder, Arena(Path(folder)) as arena:
        for number in range(given.rounds):
            for name in given.only:
                config = arena.inputs(f"sink-{number}-{name}")
                state = Path(folder) / f"{name}-{number}"
                (state / "data").mkdir(parents=True)
                found.append(_run(arena, config, name, CONTENDERS[name](config, state), backlog, given, state))
                arena.drop_inputs(config)
                print(found[-1], flush=True)
        layout = arena.layout
    print(f"\n{_table(found)}\n\n{given.rounds} rounds; {given.rate:,} records/s; {layout}; {machine()}")
    if given.json:
        given.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


def _run(
    arena: Arena, config: Config, name: str, launch: Launch, backlog: Load, given: argparse.Namespace, state: Path
) -> Figures:
    own = msgspec.structs.replace(config, state=str(state))
    committed = Committed(lambda: _lake_offsets(own) if name == "accrual" else arena.places(launch.group, config))
    produce(config, backlog, range(backlog.steps), title=f"{name}: backlog")
    worker = arena.start(launch, state / "log")
    try:
        total = arena.events(config)
        halfway: tuple[int, float] | None = None
        for done in _until(committed, total, worker):
            if halfway is None and done >= total / 2:
                halfway = done, cpu_seconds(worker.pid)
        cpu, wall = cpu_seconds(worker.pid), time.monotonic() - worker.started_at
        half, half_cpu = halfway or (0, 0.0)
        steady = Load(_whole_steps(given.rate * given.seconds / 2), _whole_steps(given.rate * given.seconds / 2))
        began = int((time.time() + SETTLE_S) * 1000)
        steady_cpu, steady_at = cpu, time.monotonic()
        with _looking(committed):
            produce(config, steady, range(steady.steps), given.rate, f"{name}: steady")
        share = (cpu_seconds(worker.pid) - steady_cpu) / (time.monotonic() - steady_at)
        for _ in _until(committed, arena.events(config), worker):
            pass
        peak = peak_mib(worker.pid)
    finally:
        worker.stop()
    delays = [
        committed.moment((topic, m.partition() or 0), m.offset() or 0) - m.timestamp()[1] / 1000
        for topic in (TopicNames(config.topics.prefix).predictions, TopicNames(config.topics.prefix).outcomes)
        for m in records(config, topic)
        if m.timestamp()[1] >= began
    ]
    sizes = [path.stat().st_size for path in state.rglob("*.parquet")]
    return Figures(
        contender=name,
        records=total,
        cpu_s=cpu,
        per_cpu_s=total / cpu,
        warm_per_cpu_s=(total - half) / (cpu - half_cpu) if cpu > half_cpu else math.nan,
        wall_s=wall,
        fresh_p50_s=percentile(delays, 50),
        fresh_p99_s=percentile(delays, 99),
        cpu_share=share,
        peak_mib=peak,
        files=len(sizes),
        file_kib=sum(sizes) / max(len(sizes), 1) / 1024,
    )


def _accrual(config: Config, state: Path) -> Launch:
    own = msgspec.structs.replace(config, state=str(state))
    return Launch([sys.executable, "-m", "consumers", "sink"], own.environment(), f"{config.topics.prefix}.sink", None)


def _parquet_writer(config: Config, state: Path) -> Launch:
    group = f"{config.topics.prefix}.parquet"
    argv = [sys.executable, str(HERE / "peers" / "parquet_writer.py"), group, str(state / "data")]
    return Launch(argv, config.environment() | {"PYTHONPATH": str(HERE.parent)}, group, None)


def _quix(config: Config, state: Path) -> Launch:
    group, names = f"{config.topics.prefix}.quix", TopicNames(config.topics.prefix)
    argv = [*quix.command(load_config().state_dir / "bench", "sink.py"), "--state", str(state), "--group", group]
    argv += ["--bootstrap", config.kafka.bootstrap_servers, "--predictions", names.predictions]
    return Launch([*argv, "--outcomes", names.outcomes], {}, group, None)


def _lake_offsets(config: Config) -> dict[tuple[str, int], int]:
    """Of the raw topics; nothing while there is no lake."""
    names = TopicNames(config.topics.prefix)
    try:
        with open_lake(config) as lake:
            rows = lake.rows("from offsets where topic in (?, ?)", [names.predictions, names.outcomes])
    except LakeUnavailable:
        return {}
    return {(row["topic"], row["partition"]): row["next_offset"] for row in rows}


def _until(committed: Committed, total: int, worker: Worker) -> Iterator[int]:
    """How many records are committed, look by look, until all are. Ends the bench when no more are for long."""
    done, moved_at = -1, time.monotonic()
    while done < total:
        time.sleep(LOOK_S)
        worker.check()
        before, done = done, committed.look()
        if done > before:
            moved_at = time.monotonic()
        elif time.monotonic() - moved_at > STUCK_S:
            raise SystemExit(f"{done} of {total} records are committed, and no more:\n{worker.last_words()}")
        yield done


@contextmanager
def _looking(committed: Committed) -> Iterator[None]:
    """Look all the time while the block runs."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            committed.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _table(found: list[Figures]) -> str:
    columns = {
        "records / CPU s": ("per_cpu_s", ",.0f"),
        "in the second half": ("warm_per_cpu_s", ",.0f"),
        "CPU s": ("cpu_s", ",.1f"),
        "wall s": ("wall_s", ",.1f"),
        "fresh p50 s": ("fresh_p50_s", ".2f"),
        "fresh p99 s": ("fresh_p99_s", ".2f"),
        "CPU at the steady rate": ("cpu_share", ".0%"),
        "peak RSS MiB": ("peak_mib", ",.0f"),
        "files": ("files", ",.0f"),
        "mean KiB": ("file_kib", ",.0f"),
    }
    lines = [f"| contender | records | {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) + 1)]
    for name in dict.fromkeys(one.contender for one in found):
        runs = [one for one in found if one.contender == name]
        cells = [f"{median(getattr(run, field) for run in runs):{form}}" for field, form in columns.values()]
        lines.append(f"| {name} | {runs[0].records:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _whole_steps(ids: float) -> int:
    return math.ceil(ids / STEP) * STEP


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=1_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--rate", type=int, default=10_000, metavar="R", help="steady records/s (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=int, default=40, metavar="S", help="of the steady rate (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the temporary files, gigabytes at full size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures there")
    return parser.parse_args()


CONTENDERS = {"accrual": _accrual, "parquet-writer": _parquet_writer, "quix": _quix}


if __name__ == "__main__":
    main()
