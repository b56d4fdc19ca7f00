"""The debate: 8,198 pairs of real arguments of UKPConvArg1Strict, each with the one that readers found convincing.

The pairs are made of 767 arguments in twelve debates, so an argument comes again, beside another one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from accrual.contract import Contract
from examples.case import Case
from examples.drawn_times import spread

DATA = Path(__file__).parent / "data" / "ukpconvarg1"
ROWS = 8_198


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` pairs in the order they are shown."""
    arguments = {row["id"]: row for row in _read("arguments.csv")}
    pairs = []
    for pair in _read("pairs.csv"):
        first, second = arguments[pair["first"]], arguments[pair["second"]]
        shown = {"topic": first["topic"], "first": first["text"], "second": second["text"]}
        pairs.append(({name: shown[name] for name in contract.inputs}, {"chosen": pair["chosen"]}))
    return spread(pairs, rows, seed)


def _read(name: str) -> Iterator[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
