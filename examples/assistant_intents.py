"""The assistant: clinc150's 23,700 real utterances; 80 intents and `out_of_scope` at launch, 70 open later."""

from __future__ import annotations

import csv
from pathlib import Path

from accrual.contract import Contract
from examples.case import Case
from examples.opening_intents import asked_over_time

DATA = Path(__file__).parent / "data" / "clinc150" / "utterances.csv"
ROWS = 23_700

_OPENED_PER_ROW = 5.5 / 1000


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """`rows` utterances in the order they are said."""
    with DATA.open(encoding="utf-8", newline="") as file:
        utterances = [(row["text"], row["intent"]) for row in csv.DictReader(file)]
    return asked_over_time(utterances, contract, rows, seed, _OPENED_PER_ROW)
