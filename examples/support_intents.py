"""The support desk: banking77's 13,083 real customer questions; 40 intents at launch, 37 open later."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from accrual.contract import Contract
from examples.case import Case
from examples.opening_intents import asked_over_time

DATA = Path(__file__).parent / "data" / "banking77"
ROWS = 13_083

_OPENED_PER_ROW = 5.5 / 1000


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """`rows` questions in the order they are asked."""
    questions = [q for name in ("train.csv", "test.csv") for q in _read(DATA / name)]
    return asked_over_time(questions, contract, rows, seed, _OPENED_PER_ROW)


def _read(path: Path) -> Iterable[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from ((row["text"], row["category"]) for row in csv.DictReader(file))
