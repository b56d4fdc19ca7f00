"""`python -m consumers`: the sink, the audit, windows and recall as commands (`accrual sink`, `accrual audit`, ...)."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from accrual.cli import run as run_command
from accrual.commands.rows import check_file
from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.errors import ConfigError, NotFound
from accrual.kafka import TopicNames
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_verify import DAMAGED, data_files, verify
from accrual.watermark import watermark_of
from consumers import canary_stream
from consumers import sink as sink_loop
from consumers.audit import audit_when_settled
from consumers.audit_record import public_key_of, verify_record, write_record
from consumers.explain import explain as life_of
from consumers.maturity import maturity
from consumers.progress import Progress, serving
from consumers.quality import Report, inspect
from consumers.quality_report import render
from consumers.recall import touched_windows
from consumers.recompute import EARLIEST, LATEST, Scope
from consumers.refill import refill as refill_files
from consumers.views import show_audit, show_canaries, show_life, show_recall, show_refilled, show_windows
from consumers.windows import next_window

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
    "   |   accrual audit --stream credit-risk --day 2009-03-01   |   accrual audit --since 4711"
    "   |   accrual audit --explain 0199-...   |   accrual audit --verify .accrual/audits/...json"
)
def audit(
    stream: Annotated[str | None, typer.Option(help="Only predictions of this stream.")] = None,
    day: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only predictions of this day (UTC).")
    ] = None,
    since: Annotated[
        int | None, typer.Option(min=0, metavar="SNAPSHOT", help="Only predictions of which something came after it.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to look again while the books do not balance.")] = 0.0,
    by_day: Annotated[bool, typer.Option("--by-day", help="A line for each day.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write everything that was found to this file.")] = None,
    record: Annotated[bool, typer.Option(help="Keep a signed record in the state folder's `audits`.")] = True,
    explain: Annotated[
        str | None, typer.Option(metavar="ID", help="Instead: tell the life of the prediction with this id.")
    ] = None,
    verify: Annotated[Path | None, typer.Option(metavar="RECORD", help="Instead: verify a signed record.")] = None,
    key: Annotated[
        Path | None, typer.Option(help="For --verify: the auditor's public key. Default: this state folder's.")
    ] = None,
) -> None:
    """Recompute the join from the raw events: do the books balance? Exit code 1, with the ids, if they do not."""
    if verify is not None:
        config = load_config()
        shown = verify_record(verify, key or public_key_of(config))
        typer.echo(f"{verify}: signed by the auditor at {shown.at:%Y-%m-%d %H:%M:%S} UTC, scope {_said(shown.scope)}.")
        show_audit(shown.audit, by_day, Console())
        return
    if json is not None:
        check_file(json)
    config, contracts = _configured(stream)
    if explain is not None:
        with open_lake(config) as lake:
            show_life(life_of(lake, TopicNames(config.topics.prefix), explain, stream), Console())
        return
    begin = EARLIEST if day is None else day.replace(tzinfo=UTC)
    until = LATEST if day is None else begin + timedelta(days=1)
    scope = Scope(stream, begin, until, since)
    found = audit_when_settled(config, contracts, scope, wait)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode({"balanced": found.balanced, "audit": found})))
    show_audit(found, by_day, Console())
    if record:
        typer.echo(f"Signed record: {write_record(config, contracts, scope, found)}")
    if not found.balanced:
        raise typer.Exit(1)


@app.command(
    epilog="Examples:  accrual windows --stream support-intents   |   accrual windows --json"
    "   |   accrual windows --report support-intents/3 --to window.html"
)
def windows(
    stream: Annotated[str | None, typer.Option(help="Only windows of this stream.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
    report: Annotated[
        str | None, typer.Option(metavar="STREAM/WINDOW", help="Write a page about this window's quality instead.")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FILE", help="Where the page goes.")] = Path("window.html"),
) -> None:
    """List the sealed windows, and what the next one of each stream still waits for.

    Maturity: of the labels that will ever come for its predictions, the share expected to be there, by the measured
    delays of all predictions of the stream. The page is about a sealed window, or about the next one once all but its
    quality has been found to be fine.
    """
    if report is not None:
        check_file(to)
        to.write_text(render(_quality_of(report)), encoding="utf-8")
        typer.echo(f"{to}: the quality of {report}")
        return
    config, contracts = _configured(stream)
    names = TopicNames(config.topics.prefix)
    with open_lake(config) as newest:
        snapshot = newest.snapshot_id()
    with open_lake(config, at_snapshot=snapshot) as lake:
        sealed = lake.rows(
            """
            select w.*, coalesce(t.predictions, 0) as touched from windows w
            left join (select stream, "window", count(*) as predictions from touched group by all) t
                using (stream, "window")
            where $stream::varchar is null or stream = $stream order by stream, "window"
            """,
            {"stream": stream},
        )
        next_ones = []
        for contract in [contracts[stream]] if stream else contracts.values():
            watermark = watermark_of(lake, contract)
            candidate = next_window(lake, contracts, names, contract.stream, watermark)
            so_far = maturity(lake, contract, watermark, candidate.since, candidate.until) if watermark else None
            next_ones.append((candidate, so_far))
    if json:
        ahead = [{**msgspec.structs.asdict(c), "waits_for": c.waits_for, "maturity": m} for c, m in next_ones]
        typer.echo(msgspec.json.encode({"sealed": sealed, "next": ahead}))
    else:
        show_windows(sealed, next_ones, Console())


@app.command(epilog="Examples:  accrual recall   |   accrual recall --stream credit-risk --json")
def recall(
    stream: Annotated[str | None, typer.Option(help="Only windows of this stream.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """List sealed windows whose ground truth has changed since, and the generations that learned from them."""
    config, _ = _configured(stream)
    with open_lake(config) as lake:
        found = touched_windows(lake, stream)
    if json:
        typer.echo(msgspec.json.encode(found))
    else:
        show_recall(found, Console())


@app.command(
    epilog="Examples:  accrual canaries support-intents --into canaries --dry-run"
    "   |   accrual canaries support-intents --into canaries   |   accrual canaries --found canaries"
)
def canaries(
    stream: Annotated[str | None, typer.Argument(help="The stream whose rules are tried.", show_default=False)] = None,
    into: Annotated[str | None, typer.Option(metavar="STREAM", help="The canary stream that they are sent to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many would be sent, and send nothing.")] = False,
    found: Annotated[
        str | None, typer.Option(metavar="STREAM", help="Instead: what became of those of this canary stream.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Send rows that are made to break a stream's rules to its canary stream, and see whether they are found there.

    They are made of the newest labeled rows, as many for each rule as `quality.canaries` of the canary stream says.
    With --found the exit code is 1 when a rule stopped fewer of them than its `recall`.
    """
    config, contracts = _configured(found)
    if found is not None:
        with open_lake(config) as lake:
            became = canary_stream.fates(lake, contracts[found])
        blind = canary_stream.missed(became, contracts[found])
        if json:
            said = [{**msgspec.structs.asdict(fate), "recall": fate.recall} for fate in became]
            typer.echo(msgspec.json.encode({"canaries": said, "missed": blind}))
        else:
            show_canaries(found, became, blind, Console())
        if blind:
            raise typer.Exit(1)
        return
    for name in (stream, into):
        if name not in contracts:
            raise typer.BadParameter(
                f"say STREAM --into STREAM (or --found STREAM); there are contracts for {', '.join(contracts)}"
            )
    own, other = contracts[stream or ""], contracts[into or ""]
    with open_lake(config) as lake:
        made = canary_stream.made_for(lake, own, other)
    counts = Counter(canary.rule for canary, _ in made) if dry_run else canary_stream.send(config, other, made)
    if json:
        typer.echo(msgspec.json.encode({"sent": not dry_run, "canaries": counts}))
        return
    for rule, count in counts.items():
        typer.echo(f"{rule}: {count} {'would be sent' if dry_run else 'sent'} to {into}")


def _said(scope: Scope) -> str:
    """The scope, for a person."""
    limits = [
        scope.stream or "all streams",
        *([f"{scope.since:%Y-%m-%d} to {scope.until:%Y-%m-%d}"] if scope.since != EARLIEST else []),
        *([f"changed after snapshot {scope.changed_since}"] if scope.changed_since is not None else []),
    ]
    return ", ".join(limits)


@app.command(epilog="Example:  accrual lake verify --repair")
def refill(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write damaged files of the lake again from Kafka (`accrual lake verify --repair`). Exit code 1 if any is left."""
    config, contracts = _configured(None)
    with open_lake_for_writing(config) as lake:
        damaged = [found for found in verify(lake, config, data_files(lake)) if found.state in DAMAGED]
        done = refill_files(config, contracts, lake, damaged)
        paths = {one.path for one in done}
        again = [file for file in data_files(lake) if file.path in paths]
        left = [found for found in verify(lake, config, again) if found.state in DAMAGED]
    if json:
        typer.echo(msgspec.json.encode({"damaged": damaged, "refilled": done}))
    else:
        show_refilled(done, Console())
    if left or any(one.why for one in done):
        raise typer.Exit(1)


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
