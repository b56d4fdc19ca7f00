"""Rows on a terminal or for a program: as a table, JSON or CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


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
            write(row.values())
    else:
        table = Table(caption=caption)
        for name in columns:
            table.add_column(Text(name), overflow="fold")  # never cut: an id may be wanted whole
        for row in rows:
            table.add_row(*(Text("" if value is None else printable(str(value))) for value in row.values()))
        Console().print(table)


def printable(text: str) -> str:
    """The text with control characters written out: what came from outside must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
