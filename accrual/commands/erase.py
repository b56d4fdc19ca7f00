"""`accrual erase`: remove what the lake holds of one person or thing, and prove it."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from accrual.config import Config, load_config
from accrual.contract import load_contracts
from accrual.errors import BrokerUnavailable, ConfigError
from accrual.kafka import TopicNames, retentions


def erase(
    subject: Annotated[str, typer.Option(help="The value that says whose rows: an id, a key, an address.")],
    stream: Annotated[str, typer.Option(help="The stream in which.")],
    by: Annotated[
        str, typer.Option(metavar="prediction_id|entity|inputs.FIELD", help="What the subject is a value of.")
    ] = "prediction_id",
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without it, only say what would be erased.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be erased, even with --yes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found and done as JSON.")] = False,
) -> None:
    """Erase a subject's rows from the lake, its history and its files; then read all that is left to prove it.

    All snapshots from before are forgotten, of every stream. With a SQLite catalog stop the sink first. Exit code 1 if
    something of the subject is left. docs/privacy.md says what becomes of Kafka's topics and of models.
    """
    from accrual import erasure
    from accrual.erasure_proof import prove
    from accrual.lake import open_lake, open_lake_for_writing

    config = load_config()
    contracts = load_contracts(Path(config.contracts))
    if stream not in contracts:
        raise ConfigError(f"no contract for stream '{stream}'; there are {', '.join(contracts)}")
    meant = erasure.subject_of(config, contracts[stream], subject, by)
    names = TopicNames(config.topics.prefix)
    if dry_run or not yes:
        with open_lake(config) as lake:
            found, proof = erasure.find(lake, names, meant), None
    else:
        with open_lake_for_writing(config) as lake:
            found = erasure.erase(lake, config, meant)
        erasure.compact_catalog(config)
        proof = prove(config, meant, found)
    contract = contracts[stream]
    forgotten_after = timedelta(microseconds=contract.horizon_us + contract.remember_us + contract.disorder_us)
    topics = _kept_until(config, names, found.arrived, forgotten_after)
    if as_json:
        typer.echo(msgspec.json.encode({"found": found, "topics": topics, "proof": proof}))
    else:
        _show(Console(), found, topics, "erased" if proof else "would be erased")
        if proof:
            _show_proof(Console(), proof)
        else:
            typer.echo("Nothing was done: --yes does it.")
    if proof and not proof.clean:
        raise typer.Exit(1)


def _kept_until(
    config: Config, names: TopicNames, arrived: dict[str, datetime], forgotten_after: timedelta
) -> dict[str, str]:
    """Each topic that may still hold records of the subject, and until when."""
    if not arrived:
        return {}
    try:
        kept = retentions(config)
    except BrokerUnavailable:
        return dict.fromkeys((*arrived, names.changelog), "unknown: no broker answers")
    until: dict[str, str] = {}
    for topic, last in arrived.items():
        if topic in kept:
            age = kept[topic]
            until[topic] = "for ever (retention.ms is -1)" if age is None else f"until {last + age:%Y-%m-%d %H:%M} UTC"
    if names.changelog in kept:
        days = forgotten_after / timedelta(days=1)
        until[names.changelog] = f"until the join forgets them, {days:,.0f} days of event time after the prediction"
    return until


def _show(console: Console, found: Any, topics: dict[str, str], done: str) -> None:
    table = Table("table", Column(f"rows {done}", justify="right"))
    for name, count in found.rows.items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    console.print(Text(f"{len(found.ids):,} predictions; sealed windows touched: {_listed(found.windows)}"))
    for taught in found.generations:
        console.print(Text(f"{taught.model} was trained on windows {_listed(taught.windows)} of them"))
    for topic, until in topics.items():
        console.print(Text(f"topic {topic} keeps its records {until}"))
    if found.pending:
        console.print(
            Text(
                f"{found.pending:,} of the predictions have no label yet: when it comes, run this again", style="yellow"
            )
        )


def _show_proof(console: Console, proof: Any) -> None:
    console.print(Text(f"Read again: {proof.rows:,} rows, {proof.files:,} files, {proof.bytes:,} bytes, the catalog."))
    for trace in proof.mentions:
        console.print(
            Text(f"the text itself is in {trace.where}, {trace.places:,} times: look whose it is", style="yellow")
        )
    for trace in proof.traces:
        console.print(Text(f"left in {trace.where}: {trace.places:,} times", style="bold red"))
    if proof.clean:
        console.print(Text("Nothing of the subject is left in the lake.", style="green"))


def _listed(windows: list[int]) -> str:
    return ", ".join(map(str, windows)) or "none"
