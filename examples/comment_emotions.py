"""The comment section: 12,000 real comments of GoEmotions, each with the emotions its readers found in it."""

from __future__ import annotations

import csv
from pathlib import Path

from accrual.contract import Contract
from examples.case import Case
from examples.drawn_times import spread

DATA = Path(__file__).parent / "data" / "goemotions" / "comments.csv"
ROWS = 12_000


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` comments in the order they are written."""
    with DATA.open(encoding="utf-8", newline="") as file:
        comments = [
            ({name: row[name] for name in contract.inputs}, {"emotions": row["emotions"]})
            for row in csv.DictReader(file)
        ]
    return spread(comments, rows, seed)
