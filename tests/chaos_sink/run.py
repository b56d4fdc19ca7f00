"""The chaos suite of the sink: seeds, each with faults of its own, on one broker.

    python -m tests.chaos_sink.run --seeds 10 --from 0 --jobs 2        (or: make chaos-sink SEEDS=10 FROM=0 JOBS=2)

Exits with 1 when anything was lost, came twice or was wrong, when books did not balance, or when damage to a file was
not found and healed, naming the seed, its faults and the command that repeats it. See docs/chaos.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from tests.chaos.cluster import own_broker
from tests.chaos.run import JAVA_OPTIONS, add_recoveries
from tests.chaos_sink.faults import KINDS
from tests.chaos_sink.seed import Seed, run_seed
from tests.chaos_sink.stand import S3_KEYS, ObjectStore, Postgres

# Of a job's process.
_SERVERS: list[tuple[Postgres, ObjectStore | None]] = []


@contextmanager
def servers(folder: Path) -> Iterator[tuple[Postgres, ObjectStore | None]]:
    """PostgreSQL and, where it was built, an S3 server, to be killed by seeds."""
    os.environ.update(S3_KEYS)
    postgres = Postgres(folder / "postgres")
    store = ObjectStore(folder / "s3") if ObjectStore.program() else None
    try:
        yield postgres, store
    finally:
        postgres.end()
        if store is not None:
            store.kill()


def begin(folder: Path) -> None:
    """Start the servers of a job's process, which end with it."""
    stack = ExitStack()
    _SERVERS.append(stack.enter_context(servers(folder / f"job-{os.getpid()}")))
    Finalize(None, stack.close, exitpriority=1)


def work(number: int, bootstrap: str, folder: Path) -> Seed:
    """Run a seed on the servers of this process."""
    place = folder / f"seed-{number}"
    try:
        return run_seed(number, bootstrap, place, *_SERVERS[0])
    except Exception as exc:  # noqa: BLE001 - the others go on
        return Seed(number, place, broken="".join(traceback.format_exception(exc)))


def summary(seeds: list[Seed]) -> Table:
    """What was injected, compared and found, over all seeds."""
    table = Table("", Column(justify="right"), "", title=f"{len(seeds)} seeds", show_header=False, title_justify="left")
    injected, found = Counter[str](), Counter[str]()
    skipped: dict[str, str] = {}
    for seed in seeds:
        injected += seed.injected
        found += seed.found
        skipped |= seed.skipped
    for kind, what in KINDS.items():
        table.add_row(f"fault: {kind}", str(injected[kind]), skipped.get(kind) or what)
    table.add_section()
    production = sum(seed.production for seed in seeds)
    table.add_row("seeds", str(len(seeds)), f"{production} on PostgreSQL and S3 with two sinks, the others embedded")
    table.add_row("faults injected", str(injected.total()))
    table.add_row("rows compared", f"{sum(seed.compared for seed in seeds):,}")
    for failure in ("lost", "duplicate", "wrong"):
        table.add_row(failure, str(found[failure]))
    table.add_row("without verdict", str(sum(bool(seed.broken) for seed in seeds)), "or unbalanced, or not healed")
    table.add_section()
    table.add_row("sinks that ended", str(sum(seed.ended for seed in seeds)), "by themselves, and were started again")
    table.add_row("sinks not stopped", str(sum(seed.unstopped for seed in seeds)), "by SIGTERM within 30 s")
    table.add_section()
    add_recoveries(table, KINDS, [recovery for seed in seeds for recovery in seed.recoveries])
    table.add_section()
    took = [seed.seconds for seed in seeds]
    table.add_row("a seed", f"{statistics.median(took):.0f} s", f"at the longest {max(took):.0f} s")
    return table


def main() -> None:
    """Run seeds, some at once, and show what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(".accrual/chaos-sink"), help="for logs and state")
    options = parser.parse_args()
    if options.jobs < 1 or options.seeds < 1:
        parser.error("--jobs and --seeds: at least 1")
    os.environ["JDK_JAVA_OPTIONS"] = JAVA_OPTIONS
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seeds: list[Seed] = []
    with (
        own_broker(folder / f"broker-{os.getpid()}") as (_, port),
        ProcessPoolExecutor(options.jobs, get_context("spawn"), begin, (folder,)) as pool,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        task = progress.add_task("chaos", total=options.seeds)
        numbers = range(options.first, options.first + options.seeds)
        for ended in as_completed(pool.submit(work, number, f"127.0.0.1:{port}", folder) for number in numbers):
            seed = ended.result()
            seeds.append(seed)
            if seed.failed:
                progress.console.print(seed.report(), highlight=False, markup=False)
            faults = sum(one.injected.total() for one in seeds)
            failed = sum(one.failed for one in seeds)
            progress.update(task, completed=len(seeds), description=f"chaos: {faults} faults, {failed} seeds failed")
    for path in (*folder.glob("broker-*"), *folder.glob("job-*")):
        shutil.rmtree(path, ignore_errors=True)
    console.print(summary(seeds))
    if failing := sorted(seed.number for seed in seeds if seed.failed):
        console.print("FAILED:", *(f"  make chaos-sink SEEDS=1 FROM={number}" for number in failing), sep="\n")
    sys.exit(1 if failing else 0)


if __name__ == "__main__":
    main()
