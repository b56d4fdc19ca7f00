"""The guide: sentences that three systems wrote of restaurants and hotels, and how people rated each; 2,460 of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accrual.contract import Contract
from examples.case import Case
from examples.drawn_times import spread

DATA = Path(__file__).parent / "data" / "nlgratings" / "ratings.csv"
ROWS = 2_460
RATED = ("informativeness", "naturalness", "quality")


def cases(_: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` replies in the order they are given."""
    return spread([(asked(row) | {"reply": row["text"]}, ratings(row)) for row in read()], rows, seed)


def read() -> Iterator[dict[str, str]]:
    """Each sentence with the system that wrote it and what people said of it."""
    with DATA.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def asked(row: dict[str, str]) -> dict[str, Any]:
    """What was to be said."""
    known = row["known"].replace("=", ": ").replace(",", "; ").replace("_", " ")
    return {"kind": row["kind"], "act": row["act"].replace("_", " "), "known": known}


def ratings(row: dict[str, str]) -> dict[str, Any]:
    """What people said of it, 1 to 6 each: the median of three of them."""
    return {name: float(row[name]) for name in RATED}
