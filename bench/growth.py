"""How the join's cost grows with partitions, with workers and with what is pending.

    python bench/growth.py                                     the tables of docs/performance.md
    python bench/growth.py --predictions 50000 --pending 10000,100000      a quick look

It starts a development broker of its own, on a core of its own, in a temporary folder; all workers share another, so
that events a second of their CPU can be compared. The first table joins a backlog, with 1 to 8 partitions and 1 or 2
workers; the second takes in predictions that stay pending, in 4 partitions, with 1 worker.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
from pathlib import Path

from arena import Arena
from check import verdict
from contenders import CONTENDERS, worker
from load import STEP, Load, produce
from machine import machine
from measure import cpu_seconds, peak_mib

from accrual.config import Config

PARTITIONS, WORKERS = (1, 2, 4, 8), (1, 2)


def main() -> None:
    """Run all and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictions", type=int, default=300_000, help="and as many outcomes (default: %(default)s)")
    parser.add_argument(
        "--pending",
        type=lambda text: [int(word) for word in text.split(",")],
        default=[10_000, 100_000, 1_000_000, 10_000_000],
        metavar="N,N",
        help="how many stay pending (default: 10000,100000,1000000,10000000)",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the temporary files, gigabytes at full size")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with tempfile.TemporaryDirectory(prefix="accrual-bench-", dir=given.folder) as folder, Arena(Path(folder)) as arena:
        print(
            "| partitions | workers | events / CPU s | CPU s | peak RSS MiB | output |\n|---:|---:|---:|---:|---:|---|"
        )
        ids = math.ceil(given.predictions / STEP) * STEP
        for partitions in PARTITIONS:
            config = arena.inputs(f"grow-{partitions}", partitions)
            load = Load(ids, ids)
            produce(config, load, range(load.steps))
            for workers in WORKERS:
                print(
                    f"| {partitions} | {workers} | {_measured(arena, config, load, workers, Path(folder))} |",
                    flush=True,
                )
            arena.drop_inputs(config)
        print("\n| pending | events / CPU s | CPU s | peak RSS MiB | output |\n|---:|---:|---:|---:|---|")
        for pending in given.pending:
            config = arena.inputs(f"pending-{pending}")
            load = Load(math.ceil(pending / STEP) * STEP, 0)
            produce(config, load, range(load.steps))
            print(f"| {pending:,} | {_measured(arena, config, load, 1, Path(folder))} |", flush=True)
            arena.drop_inputs(config)
        print(f"\n{arena.layout}; {machine()}")


def _measured(arena: Arena, config: Config, load: Load, workers: int, folder: Path) -> str:
    """Start so many workers with empty state, wait until all is committed; the cells of a row."""
    with arena.run(CONTENDERS["accrual"], config) as run, tempfile.TemporaryDirectory(dir=folder) as own:
        states = [Path(own) / f"worker-{number}" for number in range(2, workers + 1)]
        others = [arena.start(worker(config, state, state.name), state.with_suffix(".log")) for state in states]
        try:
            run.start()
            cost = run.drain()
            cpu_s = cost.cpu_s + sum(cpu_seconds(other.pid) for other in others)
            peak = max([cost.peak_mib, *(peak_mib(other.pid) for other in others)])
        finally:
            run.stop()
            for other in others:
                other.stop()
        found = verdict(config, run.output, load) if run.output else ""
    return f"{cost.events / cpu_s:,.0f} | {cpu_s:.1f} | {peak:,.0f} | {found}"


if __name__ == "__main__":
    main()
