"""The chaos suite: seeds, each a story told to real workers while faults happen to them, and judged by the oracle.

    python -m tests.chaos.run --seeds 10 --from 0 --jobs 4        (or: make chaos SEEDS=10 FROM=0 JOBS=4)

Several seeds run at once, each on a broker of its own. Exits with 1 when anything was lost, came twice or was wrong,
naming the seed, its faults and the command that repeats it; logs and a DuckDB file with all that was read and expected
then stay in the seed's folder. Ctrl-C leaves nothing running. See docs/chaos.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from accrual.broker import DevelopmentBroker
from tests.chaos.cluster import own_broker, unmount
from tests.chaos.faults import KINDS
from tests.chaos.seed import Seed, run_seed

# A seed mostly waits: twice as many as there are cores keep these busy.
JOBS = max(2, 2 * (os.cpu_count() or 1))
# A broker that lives for minutes and is killed again and again gains nothing from the second compiler: half the CPU.
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1"

_PROCESSES = multiprocessing.get_context("spawn")


class Job:
    """A process that runs seeds, one after another, on a broker of its own.

    It and its workers are a process group, so that it can be ended from here whatever it is at.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.seed: int | None = None
        self._folder = folder
        self._broker = folder / f"job-{number}"
        shutil.rmtree(self._broker, ignore_errors=True)
        self.pipe, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_work, args=(theirs, self._broker, folder), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, seed: int) -> None:
        """Have it run this seed."""
        self.seed = seed
        with suppress(BrokenPipeError):  # it has ended: `result` says so
            self.pipe.send(seed)

    def result(self) -> Seed:
        """What became of its seed; blocks until `pipe` is ready."""
        assert self.seed is not None
        try:
            done: Seed = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            why = f"its process ended with exit code {self._process.exitcode}: see {self._broker / 'job.log'}"
            return Seed(self.seed, _place(self._folder, self.seed), broken=why)
        return done

    def end(self) -> None:
        """End it by force: the process, its workers, its broker, and the small disks of its seed."""
        self._process.kill()
        self._process.join()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        DevelopmentBroker(self._broker).stop(timeout_s=0)
        shutil.rmtree(self._broker / "data", ignore_errors=True)
        if self.seed is not None:
            unmount(_place(self._folder, self.seed))


def _work(pipe: Connection, broker_folder: Path, folder: Path) -> None:
    """What a job's process does, until the other end of the pipe is closed."""
    os.setsid()
    os.environ["JDK_JAVA_OPTIONS"] = JAVA_OPTIONS
    broker_folder.mkdir(parents=True)
    log = os.open(broker_folder / "job.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    with own_broker(broker_folder) as (broker, port), suppress(EOFError):
        while True:
            number: int = pipe.recv()
            place = _place(folder, number)
            try:
                pipe.send(run_seed(number, broker, port, place))
            except Exception as exc:  # noqa: BLE001 - the others go on
                traceback.print_exc()
                where = f"see {broker_folder / 'job.log'}"
                pipe.send(Seed(number, place, broken=f"{type(exc).__name__}: {exc}; {where}"))


def _place(folder: Path, number: int) -> Path:
    return folder / f"seed-{number}"


def run_seeds(numbers: Iterable[int], jobs: int, folder: Path) -> Iterator[Seed]:
    """Run the seeds, `jobs` of them at once; yields each as it ends. One that comes to no verdict has its job replaced.

    When the caller stops early nothing is left running.
    """
    left = iter(numbers)
    working: list[Job] = []
    try:
        for slot, number in zip(range(jobs), left, strict=False):
            working.append(Job(slot, folder))
            working[-1].give(number)
        while busy := [job for job in working if job.seed is not None]:
            ready = wait([job.pipe for job in busy])
            for job in (job for job in busy if job.pipe in ready):
                seed = job.result()
                if seed.broken:
                    job.end()
                    working[working.index(job)] = job = Job(working.index(job), folder)
                job.seed = None
                if (number := next(left, None)) is not None:
                    job.give(number)
                yield seed
    finally:
        with ExitStack() as ending:
            for job in working:
                ending.callback(job.end)


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
    add_recoveries(table, KINDS, [recovery for seed in seeds for recovery in seed.recoveries])
    if took := [seed.seconds for seed in seeds if seed.seconds]:
        table.add_section()
        table.add_row("a seed", f"{statistics.median(took):.0f} s", f"at the longest {max(took):.0f} s")
    return table


def add_recoveries(table: Table, kinds: Iterable[str], recoveries: Sequence[tuple[str, float]]) -> None:
    """A row for each kind of fault, and one for all, of how many seconds it took to be over them."""
    for kind in (*kinds, ""):
        times = sorted(seconds for what, seconds in recoveries if kind in ("", what))
        if times:
            p50, p95 = statistics.median(times), times[min(len(times) - 1, int(0.95 * len(times)))]
            shown = f"p50 {p50:4.1f} s, p95 {p95:4.1f} s, max {times[-1]:4.1f} s"
            table.add_row(f"recovery: {kind or 'all'}", str(len(times)), shown)


def main() -> None:
    """Run seeds, several at once, and show what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="how many (default: %(default)s)")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first one (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=JOBS, help="how many at once (default here: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(".accrual/chaos"), help="for logs and state")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs: at least 1")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    seeds: list[Seed] = []
    interrupted = False
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        closing(
            run_seeds(range(options.first, options.first + options.seeds), options.jobs, options.folder.absolute())
        ) as running,
    ):
        task = progress.add_task("chaos", total=options.seeds)
        try:
            for seed in running:
                seeds.append(seed)
                if seed.failed:
                    progress.console.print(seed.report(), highlight=False, markup=False)
                faults = sum(one.injected.total() for one in seeds)
                failed = sum(one.failed for one in seeds)
                progress.update(task, advance=1, description=f"chaos: {faults} faults, {failed} seeds failed")
        except KeyboardInterrupt:
            interrupted = True
    console.print(summary(seeds))
    if failing := sorted((seed for seed in seeds if seed.failed), key=lambda seed: seed.number):
        console.print("FAILED:", *(f"  seed {seed.number}: {seed.again}" for seed in failing), sep="\n")
    if interrupted:
        console.print(f"interrupted after {len(seeds)} of {options.seeds} seeds")
        sys.exit(130)
    sys.exit(1 if failing else 0)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Once: what follows is not to be interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt("terminated")


if __name__ == "__main__":
    main()
