"""`accrual sql`: questions to the lake.

Any DuckDB reads the lake beside its writer, in this process or another:

    INSTALL ducklake; INSTALL sqlite;        -- or postgres, for a PostgreSQL catalog
    ATTACH 'ducklake:sqlite:.accrual/lake/catalog.sqlite' AS lake (READ_ONLY);
    USE lake;
    SELECT status, count(*) FROM ground_truth GROUP BY ALL;

`accrual sql --attach` prints these statements for the configured lake.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from accrual.config import load_config
from accrual.errors import NotHere

_SHOWN_ROWS = 100


class Format(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def sql(
    query: Annotated[str, typer.Argument(help="One SQL statement, or - to read it from standard input.")] = "",
    at: Annotated[
        int | None, typer.Option("--at", metavar="SNAPSHOT", help="Read the lake as it was at this snapshot.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print the rows.")] = Format.TABLE,
    attach: Annotated[
        bool, typer.Option("--attach", help="Print how any DuckDB attaches this lake, and ask nothing.")
    ] = False,
) -> None:
    """Ask the lake: ground_truth, predictions, outcomes, dead_letters, windows, generations, evaluations, runs."""
    try:
        from accrual.lake import attach_statements, open_lake
    except ModuleNotFoundError as exc:
        raise NotHere(f"`accrual sql` needs DuckDB, and {exc.name} is missing: pip install 'accrual[lake]'") from exc
    config = load_config()
    if attach:
        typer.echo(attach_statements(config))
        return
    statement = sys.stdin.read() if query == "-" else query
    if not statement.strip():
        raise typer.BadParameter('give a statement, such as "select count(*) from ground_truth"')
    with open_lake(config, at_snapshot=at) as lake:
        found = lake.arrow(statement)
    if form is Format.JSON:
        typer.echo(msgspec.json.encode(found.to_pylist()))
    elif form is Format.CSV:
        write = csv.writer(sys.stdout).writerow
        write(found.column_names)
        for row in found.to_pylist():
            write(row.values())
    else:
        _print_table(found.column_names, found.slice(0, _SHOWN_ROWS).to_pylist(), len(found))


def _print_table(columns: Sequence[str], rows: list[dict[str, Any]], total: int) -> None:
    table = Table(
        caption=f"the first {len(rows)} of {total} rows; all with --format csv" if total > len(rows) else None
    )
    for name in columns:
        table.add_column(Text(name))
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row.values()))
    Console().print(table)
