"""`python -m consumers`: the sink, the audit and the windows as commands (`accrual sink`, `accrual audit`, ...)."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from accrual.cli import run as run_command
from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.errors import ConfigError, NotFound
from accrual.kafka import TopicNames
from accrual.lake import open_lake
from consumers import sink as sink_loop
from consumers.audit import audit_when_settled
from consumers.progress import Progress, serving
from consumers.quality import Report, inspect
from consumers.quality_report import render
from consumers.recompute import EARLIEST, LATEST, Scope
from consumers.views import show_audit, show_windows
from consumers.windows import next_window, watermark_of

app = typer.Typer(
    help="From Kafka into the lake.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog="Examples:  accrual sink   |   accrual sink --port 9102   with /health and /metrics")
def sink(
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve /health and /metrics here. Default: not at all.")
    ] = None,
) -> None:
    """Run a sink, which fills the lake, until SIGTERM or Ctrl-C; the batch in hand is finished first."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config, contracts = _configured(None)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    progress = Progress()
    gc.freeze()  # a batch makes half a million objects that die with it: nothing to look for among those of the start
    gc.set_threshold(1_000_000, 50, 1_000)
    if port is None:
        sink_loop.run(config, contracts, stop, progress)
    else:
        with serving(progress, port):
            sink_loop.run(config, contracts, stop, progress)


@app.command(
    epilog="Examples:  accrual audit   |   accrual audit --wait 60 --json audit.json"
    "   |   accrual audit --stream credit-risk --day 2009-03-01"
)
def audit(
    stream: Annotated[str | None, typer.Option(help="Only predictions of this stream.")] = None,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only predictions of this day (UTC).")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to look again while the books do not balance.")] = 0.0,
    by_day: Annotated[bool, typer.Option("--by-day", help="A line for each day.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything that was found to this file.")] = None,
) -> None:
    """Recompute the join from the raw events: do the books balance? Exit code 1, with the ids, if they do not."""
    config, contracts = _configured(stream)
    since = EARLIEST if day is None else day.replace(tzinfo=UTC)
    until = LATEST if day is None else since + timedelta(days=1)
    found = audit_when_settled(config, contracts, Scope(stream, since, until), wait)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode({"balanced": found.balanced, "audit": found})))
    show_audit(found, by_day, Console())
    if not found.balanced:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:  accrual windows --stream support-intents"
    "   |   accrual windows --report support-intents/3 --to window.html"
)
def windows(
    stream: Annotated[str | None, typer.Option(help="Only windows of this stream.")] = None,
    report: Annotated[
        str | None, typer.Option(metavar="STREAM/WINDOW", help="Write a page about this window's quality instead.")
    ] = None,
    to: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("window.html"),
) -> None:
    """List the sealed windows, and what the next one of each stream still waits for.

    The page is about a sealed window, or about the next one once all but its quality has been found to be fine.
    """
    if report is not None:
        to.write_text(render(_quality_of(report)), encoding="utf-8")
        typer.echo(f"{to}: the quality of {report}")
        return
    config, contracts = _configured(stream)
    names = TopicNames(config.topics.prefix)
    with open_lake(config) as newest:
        snapshot = newest.snapshot_id()
    with open_lake(config, at_snapshot=snapshot) as lake:
        sealed = lake.rows(
            "select * from windows where ?::varchar is null or stream = ? order by all", [stream, stream]
        )
        chosen = [stream] if stream else list(contracts)
        candidates = [next_window(lake, contracts, names, s, watermark_of(lake, contracts[s])) for s in chosen]
    show_windows(sealed, candidates, Console())


def _quality_of(name: str) -> Report:
    """The report on `STREAM/WINDOW`: by the contract of today, of a sealed window as it was sealed."""
    stream, _, number = name.rpartition("/")
    if not number.isdecimal():
        raise typer.BadParameter(f"'{name}' is not STREAM/WINDOW, such as support-intents/3")
    config, contracts = _configured(stream)
    with open_lake(config) as newest:
        found = newest.rows('from windows where stream = ? and "window" = ?', [stream, int(number)])
        snapshot = found[0]["snapshot_id"] if found else newest.snapshot_id()
    with open_lake(config, at_snapshot=snapshot) as lake:
        if found:
            return inspect(lake, contracts[stream], int(number), found[0]["from_time"], found[0]["to_time"])
        names, contract = TopicNames(config.topics.prefix), contracts[stream]
        candidate = next_window(lake, contracts, names, stream, watermark_of(lake, contract))
    if candidate.window != int(number):
        raise NotFound(f"{stream} has no window {number}; `accrual windows` lists those it has")
    if candidate.quality is None:
        raise NotFound(f"window {number} of {stream} has not been checked: it waits for {candidate.waits_for}")
    return candidate.quality


def _configured(stream: str | None) -> tuple[Config, dict[str, Contract]]:
    config = load_config()
    contracts = load_contracts(Path(config.contracts))
    if stream is not None and stream not in contracts:
        raise ConfigError(f"no contract for stream '{stream}'; there are {', '.join(contracts)}")
    return config, contracts


if __name__ == "__main__":
    run_command(app)
