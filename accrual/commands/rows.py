"""Rows on a terminal or for a program: as a table, JSON or CSV."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from accrual.errors import ConfigError

_SHORT = 24  # cells of no more characters stay on a line
_BESIDE = 3  # characters between two columns
_ANY_WIDTH = 100_000


class Format(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def print_rows(
    form: Format, columns: Sequence[str], rows: Iterable[dict[str, Any]], caption: str | None = None
) -> None:
    """Print rows, each with a value for every column. The caption belongs to the table; the others are rows only."""
    if form is Format.JSON:
        typer.echo(msgspec.json.encode(list(rows)))
    elif form is Format.CSV:
        write = csv.writer(sys.stdout).writerow
        write(columns)
        for row in rows:
            write(row[name] for name in columns)
    else:
        cells = [["" if row[name] is None else printable(str(row[name])) for name in columns] for row in rows]
        _print_table(columns, cells, caption)


def _print_table(columns: Sequence[str], cells: Sequence[Sequence[str]], caption: str | None) -> None:
    """A table; on a terminal that is too narrow for it each row by itself, a line for each column."""
    table, least = Table(caption=caption), 1
    for place, name in enumerate(columns):
        longest = max(len(name), *(len(row[place]) for row in cells), 0)
        # Never cut: an id may be wanted whole.
        table.add_column(Text(name), overflow="fold", no_wrap=longest <= _SHORT, min_width=min(longest, _SHORT))
        least += min(longest, _SHORT) + _BESIDE
    for row in cells:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a file has no width of its own
        whole = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table)
        console = Console(width=max(whole.maximum, console.width))
    if least <= console.width:
        console.print(table)
        return
    for number, row in enumerate(cells, 1):
        console.print(Rule(str(number), align="left", style="dim"))
        record = Table.grid(padding=(0, 2))
        record.add_column(no_wrap=True)
        record.add_column(overflow="fold")
        for name, cell in zip(columns, row, strict=True):
            record.add_row(Text(name, style="bold"), Text(cell))
        console.print(record)
    if caption:
        console.print(Text(caption, style="italic"))


def check_file(path: Path) -> None:
    """Before work whose result goes into a file. Raises ConfigError when it could not be written there."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}; make it first")


def printable(text: str) -> str:
    """The text with control characters written out: what came from outside must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
