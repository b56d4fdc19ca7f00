"""`accrual lake`: how large it is, which snapshots it has, and its maintenance."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from accrual.commands.stages import become
from accrual.config import load_config

app = typer.Typer(help="The lake: its size, its snapshots, its maintenance.", no_args_is_help=True)


@app.command(epilog="Example:  accrual lake stats")
def stats() -> None:
    """Print the files and bytes of each table, and how many files could be merged away."""
    from accrual.lake import open_lake
    from accrual.lake_maintenance import table_sizes

    table = Table("table", *(Column(name, justify="right") for name in ("files", "MiB", "surplus")))
    with open_lake(load_config()) as lake:
        for size in table_sizes(lake):
            table.add_row(size.table, f"{size.files:,}", f"{size.bytes / 2**20:,.1f}", f"{size.surplus:,}")
    Console().print(table)


@app.command(epilog="Example:  accrual lake snapshots --last 50")
def snapshots(last: Annotated[int, typer.Option(min=1, help="How many of the newest.")] = 20) -> None:
    """Print the newest snapshots, and which windows name them."""
    from accrual.lake import open_lake

    table = Table("snapshot", "committed", "windows")
    with open_lake(load_config()) as lake:
        for row in lake.rows(
            """
            select s.snapshot_id, s.snapshot_time, string_agg(w.stream || ' ' || w."window", ', ') as windows
            from ducklake_snapshots('lake') s left join windows w using (snapshot_id)
            group by all order by s.snapshot_id desc limit ?
            """,
            [last],
        ):
            table.add_row(str(row["snapshot_id"]), f"{row['snapshot_time']:%Y-%m-%d %H:%M:%S}", row["windows"] or "")
    Console().print(table)


@app.command(epilog="Examples:  accrual lake maintain --dry-run   |   accrual lake maintain")
def maintain(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Merge small files, expire old snapshots, delete files nobody needs. A running sink does so by itself.

    With a SQLite catalog stop the sink first: a lake has one writer.
    """
    from accrual import lake_maintenance
    from accrual.lake import open_lake_for_writing

    with open_lake_for_writing(load_config()) as lake:
        work = lake_maintenance.maintain(lake, dry_run=dry_run)
    would = "would be " if dry_run else ""
    typer.echo(
        f"{would}merged: {', '.join(work.merged) or 'nothing'}; {would}expired: {work.snapshots} snapshots; "
        f"{would}deleted: {work.files} files no longer needed, {work.orphans} that no commit knows"
    )


@app.command(epilog="Examples:  accrual lake verify --json   |   accrual lake verify --repair")
def verify(
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Write damaged files again from Kafka. SQLite: stop the sink first."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read all files of the lake: is any missing, truncated or altered? Exit code 1, with their paths, if one is.

    A file that the sink has not recorded yet (it does so about once a minute) is checked for its size and end alone.
    """
    from accrual import lake_verify
    from accrual.lake import open_lake

    if repair:
        become("consumers", "refill", *(["--json"] if json else []))
    config = load_config()
    with open_lake(config) as lake:
        files = lake_verify.data_files(lake)
        checked = lake_verify.verify(lake, config, files)
        found = list(track(checked, "verifying", total=len(files), console=Console(stderr=True), transient=True))
    states = lake_verify.tally(found)
    damaged = [one for one in found if one.state in lake_verify.DAMAGED]
    if json:
        typer.echo(msgspec.json.encode({"states": states, "damaged": damaged}))
    else:
        table = Table("table", "file", "state", Column("rows", justify="right"), "")
        for one in damaged:
            table.add_row(one.file.table, one.file.path, one.state, f"{one.file.rows:,}", one.detail)
        if damaged:
            Console().print(table)
        typer.echo(f"{len(found)} files: " + (", ".join(f"{n} {state}" for state, n in states.items()) or "none"))
    if damaged:
        raise typer.Exit(1)
