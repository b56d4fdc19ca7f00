"""Makes a virtual environment for the Quix Streams peers (a join, a sink) when needed, and starts the join there.

    python bench/peers/quix/run.py --bootstrap 127.0.0.1:9092 --predictions accrual.predictions \\
        --outcomes accrual.outcomes --output joined --group peer --state /tmp/peer

Its own environment: it pins a version of confluent-kafka.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from accrual.config import load_config

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"


def command(state: Path, program: str = "join.py") -> list[str]:
    """The command that runs a peer; its environment is made under `state` when its requirements have changed."""
    folder = state / "quix-venv"
    python = folder / "bin" / "python"
    installed = folder / "requirements.txt"
    if not installed.exists() or installed.read_bytes() != REQUIREMENTS.read_bytes():
        print("making the environment of the Quix Streams peer", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", REQUIREMENTS], check=True)
        shutil.copy(REQUIREMENTS, installed)
    return [str(python), str(HERE / program)]


if __name__ == "__main__":
    program = command(load_config().state_dir / "bench")
    os.execv(program[0], [*program, *sys.argv[1:]])
