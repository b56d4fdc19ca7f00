"""Starts the stock Faust join in the project's own environment.

    python bench/peers/faust/run.py --bootstrap 127.0.0.1:9092 --predictions accrual.predictions \\
        --outcomes accrual.outcomes --output joined --group peer --state /tmp/peer
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def command(_state: Path) -> list[str]:
    """The command that runs the join."""
    return [sys.executable, str(HERE / "join.py")]


if __name__ == "__main__":
    program = command(Path())
    os.execv(program[0], [*program, *sys.argv[1:]])
