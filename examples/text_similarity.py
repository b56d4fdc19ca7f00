"""The reviewer: 2,786 real pairs of the STS benchmark's training part, each with how alike people rated the two."""

from __future__ import annotations

import csv
from pathlib import Path

from accrual.contract import Contract
from examples.case import Case
from examples.drawn_times import spread

DATA = Path(__file__).parent / "data" / "stsbenchmark" / "pairs.csv"
ROWS = 2_786


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` pairs in the order they are compared."""
    with DATA.open(encoding="utf-8", newline="") as file:
        pairs = [
            ({name: row[name] for name in contract.inputs}, {"similarity": float(row["similarity"])})
            for row in csv.DictReader(file)
        ]
    return spread(pairs, rows, seed)
