"""Credit risk: loans that LendingClub issued from June 2007 to December 2011, with their real dates.

A loan is a prediction on the day it is issued (the file knows the month; rows are spread over it in file order). Its
outcome becomes known at the last payment of one paid in full, and 150 days after the last payment of one charged off,
which is when LendingClub writes a loan off: one month to six years later. Nothing else is made up.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from accrual.contract import Contract
from examples.case import Case

DATA = Path(__file__).parent / "data" / "lending-club-2007-2011.parquet"
ROWS = 42_535

_PAST_DUE = timedelta(days=150)


def cases(contract: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` loans in order of issue."""
    loans: list[dict[str, Any]] = pq.read_table(
        DATA, columns=["issued_on", "last_payment_on", "status", *contract.inputs]
    ).to_pylist()
    in_month = Counter(loan["issued_on"] for loan in loans)
    seen: Counter[datetime] = Counter()
    issued: list[datetime] = []
    for loan in loans:
        month = loan["issued_on"].replace(tzinfo=UTC)
        length = (month + timedelta(days=32)).replace(day=1) - month
        issued.append(month + length * (seen[month] / in_month[loan["issued_on"]]))
        seen[month] += 1
    sample = random.Random(seed).sample(range(len(loans)), min(rows, len(loans)))
    return sorted((_case(contract, loans[n], issued[n]) for n in sample), key=lambda case: case.predicted_at)


def _case(contract: Contract, loan: dict[str, Any], issued_at: datetime) -> Case:
    last_payment = loan["last_payment_on"]
    known_at = issued_at if last_payment is None else last_payment.replace(tzinfo=UTC)
    if loan["status"] == "Charged Off":
        known_at += _PAST_DUE
    return Case(
        issued_at,
        {name: loan[name] for name in contract.inputs},
        [(max(known_at, issued_at), {"status": loan["status"]})],
    )
