"""`accrual sql`: questions to the lake.

Any DuckDB reads the lake beside its writer, in this process or another:

    INSTALL ducklake; INSTALL sqlite;        -- or postgres, for a PostgreSQL catalog
    ATTACH 'ducklake:sqlite:.accrual/lake/catalog.sqlite' AS lake (READ_ONLY);
    USE lake;
    SELECT status, count(*) FROM ground_truth GROUP BY ALL;

`accrual sql --attach` prints these statements for the configured lake.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from accrual.commands.rows import Format, print_rows
from accrual.config import load_config
from accrual.errors import NotHere

_SHOWN_ROWS = 100


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
    shown = found.slice(0, _SHOWN_ROWS) if form is Format.TABLE else found
    more = f"the first {len(shown)} of {len(found)} rows; all with --format csv" if len(found) > len(shown) else None
    print_rows(form, found.column_names, shown.to_pylist(), more)
