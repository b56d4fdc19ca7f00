"""A case: one row of real data, told the way a production service lives it: first the question, later the answer."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec


class Case(msgspec.Struct, frozen=True):
    """When a prediction is asked for, what is known then, and each thing learned later as (observed_at, values)."""

    predicted_at: datetime
    inputs: dict[str, Any]
    outcomes: list[tuple[datetime, dict[str, Any]]]
