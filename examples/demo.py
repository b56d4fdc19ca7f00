"""The demo: the whole loop on real data, on this machine. `accrual demo`, or `python -m examples.demo`.

A production service is replayed; the real workers run beside it as processes of their own; the trainer publishes what
earned it, and the service picks it up. At the end the audit recomputes the books, and a table and `report.html` say
what each generation was worth on data that it had not seen.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.live import Live

from accrual import load_config
from accrual.cli import run
from accrual.commands.rows import check_file
from accrual.config import Config
from accrual.errors import ConfigError
from accrual.lake import open_lake
from accrual.supervisor import Supervisor
from examples.board import Board
from examples.figures import Figures, find, measure_of
from examples.ground import own_folder, prepare, reached_broker, shipped_contract
from examples.report import render
from examples.service import STREAMS
from examples.table import trials_table

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SILENT_S = 900.0  # a training takes that long on two busy cores, and nothing is said in between
_QUIET_S = 20.0  # a sink on a busy machine takes seconds to seal a window
_interrupted = threading.Event()


class Plan(msgspec.Struct, frozen=True):
    """How much of the data is replayed, how fast, and in windows of which size (0: the contract's)."""

    rows: int
    minutes: float
    window_rows: int = 0


PLANS = {
    "support-intents": Plan(rows=13_083, minutes=3.5),
    "assistant-intents": Plan(rows=15_000, minutes=3.5),
    "credit-risk": Plan(rows=10_634, minutes=3.5, window_rows=400),
    "comment-emotions": Plan(rows=12_000, minutes=3.5),
    "text-similarity": Plan(rows=2_786, minutes=3.5),
    "argument-ranking": Plan(rows=5_000, minutes=3.5),
    "restaurant-texts": Plan(rows=400, minutes=20.0),
    "venue-replies": Plan(rows=2_460, minutes=20.0),
    "venue-choices": Plan(rows=1_091, minutes=20.0),
}
QUICK = {
    "support-intents": Plan(rows=3000, minutes=1.2, window_rows=400),
    "assistant-intents": Plan(rows=4000, minutes=1.2, window_rows=600),
    "credit-risk": Plan(rows=4000, minutes=1.2, window_rows=250),
    "comment-emotions": Plan(rows=3500, minutes=1.2, window_rows=500),
    "text-similarity": Plan(rows=1400, minutes=1.2, window_rows=250),
    "argument-ranking": Plan(rows=2400, minutes=1.2, window_rows=400),
    "restaurant-texts": Plan(rows=200, minutes=8.0, window_rows=40),
    "venue-replies": Plan(rows=500, minutes=8.0, window_rows=100),
    "venue-choices": Plan(rows=300, minutes=8.0, window_rows=60),
}


def demo(
    stream: Annotated[str, typer.Option(help=f"One of {', '.join(STREAMS)}.")] = "support-intents",
    minutes: Annotated[float | None, typer.Option(min=0.1, help="How long the replay takes; 3.5 unless given.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=200, help="How many rows of the data are replayed, in the contract's windows.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A shortened run: fewer rows, smaller windows.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 7,
    report: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("report.html"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures for a program, too.")] = None,
    keep_broker: Annotated[
        bool, typer.Option("--keep-broker", help="Leave a broker that was started running.")
    ] = False,
) -> None:
    """Run the whole loop on real data: capture, join, lake, training, publishing; then audit it and report."""
    if stream not in STREAMS:
        raise ConfigError(f"--stream {stream}: there is data for {', '.join(STREAMS)}")
    for file in (report, json_file):
        if file is not None:
            check_file(file)
    plan = (QUICK if quick else PLANS)[stream]
    window_rows = plan.window_rows if quick or rows is None else 0
    plan = Plan(rows or plan.rows, minutes or plan.minutes, window_rows)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width of its own
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for sign in _SIGNALS:
        signal.signal(sign, _interrupt)
    try:
        figures = _run(console, stream, plan, seed, keep_broker)
    except KeyboardInterrupt:
        console.print("Interrupted: everything that was started is stopped.")
        raise typer.Exit(130) from None
    report.write_text(render(figures), encoding="utf-8")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2))
    console.print(trials_table(figures))
    _conclude(console, figures, report)
    if not figures.balances:
        raise typer.Exit(1)


def _run(console: Console, stream: str, plan: Plan, seed: int, keep_broker: bool) -> Figures:
    """Start everything, replay, let the trainer finish, audit, stop everything."""
    began = time.monotonic()
    base = load_config()
    contract = shipped_contract(base, stream, plan.window_rows)
    with own_folder(base) as home, reached_broker(base, keep_broker) as (config, started):
        console.print(f"Broker at {config.kafka.bootstrap_servers}" + (", started for this run." if started else "."))
        config, removed = prepare(config, home, contract)
        console.print(f"State in {home}" + ("; the last demo's was removed." if removed else "."))
        share = plan.rows / STREAMS[stream].ROWS
        console.print(
            f"Replaying {plan.rows:,} rows of {stream} ({min(1, share):.0%} of the data) in {plan.minutes:g} min."
        )
        # Service and trainer both compute: with more threads than cores each would wait for the other's at every step.
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
        with Supervisor(home / "logs", {**config.environment(), "OMP_NUM_THREADS": threads}) as supervisor:
            port = _free_port()
            _start(supervisor, "join", "streams", "worker", "--web-port", "0")
            _start(supervisor, "monitor", "streams", "monitor", "--web-port", port)
            _start(supervisor, "sink", "consumers", "sink")
            _start(supervisor, "trainer", "trainer")
            replay = ("--stream", stream, "--rows", plan.rows, "--seed", seed, "--minutes", plan.minutes)
            _start(supervisor, "service", "examples.service", *replay)
            board = Board(config, contract, supervisor.workers["service"].log, f"http://127.0.0.1:{port}/quality")
            _watch(console, supervisor, board, stream)
            balances, books = _audit(config, stream)
            restarts = {name: worker.restarts for name, worker in supervisor.workers.items()}
        with open_lake(config) as lake:
            findings = find(lake, stream)
    sql = "select model, avg((output->>'label' = label)::int) as accuracy from ground_truth group by model"
    return Figures(
        stream=stream,
        rows=plan.rows,
        share=min(1.0, share),
        seed=seed,
        measure=measure_of(contract),
        seconds=time.monotonic() - began,
        lake=config.lake_catalog,
        sql_example=f'ACCRUAL_CONFIG={os.path.relpath(home)}/accrual.toml accrual sql "{sql}"',
        restarts=restarts,
        balances=balances,
        books=books,
        findings=findings,
    )


def _start(supervisor: Supervisor, name: str, module: str, *arguments: str | float) -> None:
    supervisor.start(name, [sys.executable, "-m", module, *map(str, arguments)])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch(console: Console, supervisor: Supervisor, board: Board, stream: str) -> None:
    """Show the run until the service has ended and no window is left for the trainer to judge a challenger on.

    A trainer that says nothing new for `_SILENT_S` seconds after that, and after the last window, is not waited for.
    """
    service = supervisor.workers["service"]
    heard = said = time.monotonic()
    last = board.run, board.sealed
    try:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while time.monotonic() - heard < _SILENT_S:
                if _interrupted.is_set():  # and what was raised is lost: DuckDB swallows it where it looks up a name
                    raise KeyboardInterrupt
                supervisor.watch()
                board.poll(0.3)
                if console.is_terminal:
                    live.update(board.render(f"accrual demo: {stream}", supervisor))
                elif time.monotonic() - said > 10:
                    said = time.monotonic()
                    console.print(board.line(), soft_wrap=True)
                if service.finished and board.is_settled(_QUIET_S):
                    return
                if not service.finished or (board.run, board.sealed) != last:
                    heard, last = time.monotonic(), (board.run, board.sealed)
    finally:
        board.close()
    console.print(f"The trainer has said nothing new for {_SILENT_S:.0f} s; going on without its verdict.")


def _conclude(console: Console, figures: Figures, report: Path) -> None:
    """What to remember of the run, and where the rest is."""
    last = figures.findings.last
    if last is None:
        console.print("No challenger was judged: too few rows or too short a run for two windows.")
    else:
        better = "beats" if last.champion.brier < last.generation_0.brier else "does not beat"
        console.print(
            f"On window {last.window}, which it had not been trained on, {last.champion.model} {better} generation 0:"
            f" Brier {last.champion.brier:.3f} | {last.generation_0.brier:.3f},"
            f" accuracy {last.champion.accuracy:.3f} | {last.generation_0.accuracy:.3f}."
        )
    served = ", ".join(f"{model} {count:,}" for model, count in figures.findings.served.items())
    console.print(f"Predictions served: {served}.")
    books = ", ".join(f"{name} {count:,}" for name, count in figures.books.items())
    console.print(f"Audit: {'the books balance' if figures.balances else 'THE BOOKS DIFFER'} ({books}).")
    console.print(f"Report: {report}. The lake: {figures.sql_example}", soft_wrap=True, highlight=False)
    console.print(f"Took {figures.seconds:.0f} s.")


def _audit(config: Config, stream: str) -> tuple[bool, dict[str, int]]:
    """Whether the books balance, as `accrual audit` itself says, and the books summed over all days."""
    result = config.state_dir / "audit.json"
    done = subprocess.run(
        [sys.executable, "-m", "consumers", "audit", "--wait", "60", "--json", str(result)],
        env={**os.environ, **config.environment()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    days = msgspec.json.decode(result.read_bytes())["audit"]["balances"]
    names = ("captured", "labeled", "expired", "pending", "dead_lettered", "duplicate")
    return done.returncode == 0, {name: sum(day[name] for day in days if day["stream"] == stream) for name in names}


def _interrupt(sign: int, _frame: FrameType | None) -> None:
    """End the run in order, once: what is being stopped must not be interrupted half-way."""
    for again in _SIGNALS:
        signal.signal(again, signal.SIG_IGN)
    _interrupted.set()
    raise KeyboardInterrupt(signal.Signals(sign).name)


if __name__ == "__main__":
    run(lambda: typer.run(demo))
