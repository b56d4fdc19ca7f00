"""Every command in the documentation is run: in `sh` blocks, as written, against what a shortened demo left.

The exceptions are `make` targets, which are those of the Makefile: CI runs them, or they run CI.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.conftest import ROOT, QuickDemo

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(500)]


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip() and not line.startswith("#")]


DOCUMENTED = [(page, line) for page in PAGES for line in commands_of(page)]
MAKE = [(page, line) for page, line in DOCUMENTED if re.match(r"(\w+=\S+ )*make\b", line)]
RUN = [page for page in PAGES if any(found is page and (found, line) not in MAKE for found, line in DOCUMENTED)]


@pytest.mark.parametrize(("page", "line"), MAKE, ids=lambda value: value if isinstance(value, str) else value.name)
def test_make_targets_exist(page: Path, line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split("make ", 1)[1].split()[0] in targets


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_commands_run_as_written(page: Path, quick_demo: QuickDemo, tmp_path: Path) -> None:
    lines = [line.replace(".accrual/demo", f"{quick_demo.state}/demo") for found, line in DOCUMENTED if found == page]
    script = tmp_path / "script.sh"
    script.write_text("set -e\n" + "\n".join(line for line in lines if not re.match(r"(\w+=\S+ )*make\b", line)))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", str(tmp_path)),
        "ACCRUAL_STATE": str(tmp_path / "state"),
    }
    if any("ACCRUAL_CONFIG" in line for line in lines):
        del environment["ACCRUAL_STATE"]  # it names the demo's configuration, as a reader does
    done = subprocess.run(
        ["sh", str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=450
    )
    assert done.returncode == 0, f"{script.read_text()}\n{done.stdout}\n{done.stderr}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
