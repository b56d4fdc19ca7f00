"""One shortened demo for all tests that look at what a demo leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from examples.figures import Figures

ROOT = Path(__file__).parents[2]
SHORT = ("--rows", "2000", "--minutes", "1")


class QuickDemo(msgspec.Struct, frozen=True):
    """What it printed and found, and where its state is."""

    said: str
    figures: Figures
    state: Path
    report: Path


def demo_environment(state: Path, bootstrap: str) -> dict[str, str]:
    return {
        **os.environ,
        "ACCRUAL_STATE": str(state),
        "ACCRUAL_CONTRACTS": str(ROOT / "schemas" / "contracts"),
        "ACCRUAL_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
    }


@pytest.fixture(scope="session")
def quick_demo(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> QuickDemo:
    """`accrual demo --quick`, made as short as in `.ci/run`, run once; fails when it fails."""
    folder = tmp_path_factory.mktemp("demo")
    output, report = folder / "figures.json", folder / "r.html"
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--quick", *SHORT, "--json", str(output), "--report", str(report)],
        cwd=ROOT,
        env=demo_environment(folder / "state", bootstrap),
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = msgspec.json.decode(output.read_bytes(), type=Figures)
    return QuickDemo(done.stdout, figures, folder / "state", report)
