"""The guide: what is known of restaurants, and what people wrote of it; 4,672 texts of the E2E NLG challenge."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from accrual.contract import Contract
from examples.case import Case
from examples.drawn_times import spread

DATA = Path(__file__).parent / "data" / "e2e" / "devset.csv"
ROWS = 4_672

_KNOWN = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
_INPUTS = {
    "name": "name",
    "eatType": "kind",
    "food": "food",
    "priceRange": "price",
    "customer rating": "rating",
    "area": "area",
    "near": "near",
    "familyFriendly": "for_families",
}


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` restaurants in the order they are written about."""
    with DATA.open(encoding="utf-8", newline="") as file:
        written = [(_inputs(contract, row["mr"]), {"text": row["ref"]}) for row in csv.DictReader(file)]
    return spread(written, rows, seed)


def _inputs(contract: Contract, known: str) -> dict[str, Any]:
    """`name[Cotto], area[riverside]` by the contract's names."""
    found = {_INPUTS[name]: value for name, value in _KNOWN.findall(known)}
    return {name: found.get(name) for name in contract.inputs}
