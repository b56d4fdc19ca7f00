"""`accrual sql`: questions to the lake.

Any DuckDB reads the lake beside its writer, in this process or another:

    INSTALL ducklake; INSTALL sqlite;        -- or postgres, for a PostgreSQL catalog
    ATTACH 'ducklake:sqlite:.accrual/lake/catalog.sqlite' AS lake (READ_ONLY);
    USE lake;
    SELECT status, count(*) FROM ground_truth GROUP BY ALL;

`accrual sql --attach` prints these statements for the configured lake; `--shell` opens DuckDB's shell on it.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from accrual.commands.moments import Moment, moment, snapshot_of
from accrual.commands.rows import Format, print_rows
from accrual.config import Config, load_config
from accrual.errors import NotHere

_SHOWN_ROWS = 100


def sql(
    query: Annotated[str, typer.Argument(help="One SQL statement, or - to read it from standard input.")] = "",
    at: Annotated[
        Moment | None,
        typer.Option(
            "--at",
            parser=moment,
            metavar="SNAPSHOT|TIME",
            help="Read the lake as it was at this snapshot, or at a time (UTC unless it says): 2025-03-01T12:00.",
        ),
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How to print the rows.")] = Format.TABLE,
    attach: Annotated[
        bool, typer.Option("--attach", help="Print how any DuckDB attaches this lake, and ask nothing.")
    ] = False,
    shell: Annotated[bool, typer.Option("--shell", help="Open DuckDB's shell on the lake, read-only.")] = False,
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
    if shell:
        if query:
            raise typer.BadParameter("--shell reads statements itself: leave out the one given")
        _become_shell(config, at)
    statement = sys.stdin.read() if query == "-" else query
    if not statement.strip():
        raise typer.BadParameter('give a statement, such as "select count(*) from ground_truth"')
    with open_lake(config, at_snapshot=snapshot_of(config, at)) as lake:
        found = lake.arrow(statement)
    shown = found.slice(0, _SHOWN_ROWS) if form is Format.TABLE else found
    more = f"the first {len(shown)} of {len(found)} rows; all with --format csv" if len(found) > len(shown) else None
    print_rows(form, found.column_names, shown.to_pylist(maps_as_pydicts="strict"), more)


def _become_shell(config: Config, at: Moment | None) -> NoReturn:
    """Replace this process by DuckDB's shell. Credentials reach it by a pipe, so that no list of processes has them."""
    from accrual.lake import open_lake, shell

    snapshot = snapshot_of(config, at)
    open_lake(config, at_snapshot=snapshot).close()  # what is wrong is said here, better than the shell can
    program, statements = shell(config, snapshot)
    reading, writing = os.pipe()
    os.write(writing, statements.encode())
    os.close(writing)
    os.set_inheritable(reading, True)
    sys.stdout.flush()
    os.execv(program, [program, "-init", f"/dev/fd/{reading}"])
