"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(what: Callable[[], object], seconds: float = 60.0) -> None:
    """Return once it holds, or after `seconds`: the assert that follows then says what is wrong."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.3)
