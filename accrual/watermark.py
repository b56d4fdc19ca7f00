"""The watermark: how far event time of a stream has come in the lake."""

from __future__ import annotations

from datetime import datetime, timedelta

from accrual.contract import Contract
from accrual.lake import Lake


def watermark_of(lake: Lake, contract: Contract) -> datetime | None:
    """The latest time of any event of the stream, less its disorder; None without events."""
    found = lake.rows(
        """
        select greatest((select max(predicted_at) from predictions where stream = ?),
                        (select max(observed_at) from outcomes where stream = ?),
                        (select max(moment) from ticks where stream = ?)) as reached
        """,
        [contract.stream] * 3,
    )[0]["reached"]
    return None if found is None else found - timedelta(microseconds=contract.disorder_us)
