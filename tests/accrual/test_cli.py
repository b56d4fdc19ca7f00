"""The `accrual` command as a terminal sees it: its own process, exit codes, one message on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from accrual.cli import app
from accrual.commands import stages
from accrual.errors import NotHere


def _accrual(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from accrual.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200", **environment},
    )


def _paths(command: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command below `command`."""
    below = getattr(command, "commands", {})
    return [path] if not below else [deeper for name, c in below.items() for deeper in _paths(c, (*path, name))]


@pytest.mark.parametrize(
    "path", [p for p in _paths(typer.main.get_command(app)) if p[0] not in stages.STAGES], ids=" ".join
)
def test_help_of_every_command_has_an_example(path: tuple[str, ...]) -> None:
    shown = _accrual(*path, "--help")
    assert shown.returncode == 0
    assert f"accrual {' '.join(path)}" in shown.stdout, "no example of the command itself"


def test_an_error_is_one_message_and_exit_code_1(tmp_path: Path) -> None:
    failed = _accrual("broker", "start", cwd=tmp_path, ACCRUAL_KAFKA_BOOTSTRAP_SERVERS="kafka.example:9092")
    assert failed.returncode == 1
    assert failed.stderr.startswith("accrual: kafka.bootstrap_servers is kafka.example:9092")
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_wrong_usage_is_exit_code_2() -> None:
    assert _accrual("no-such-command").returncode == 2


def test_status_of_a_broker_that_does_not_run_is_exit_code_3(tmp_path: Path) -> None:
    status = _accrual("broker", "status", ACCRUAL_STATE=str(tmp_path))
    assert (status.returncode, status.stderr) == (3, "")
    assert "does not run" in status.stdout


def test_a_stage_gets_its_options_and_keeps_its_exit_code(tmp_path: Path) -> None:
    stage = tmp_path / "trainer"
    stage.mkdir()
    (stage / "__init__.py").touch()
    (stage / "__main__.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    became = _accrual(
        "train", "--help", "-x", "--key=value", "word", cwd=tmp_path, PYTHONPATH=_before_checkout(tmp_path)
    )
    assert became.returncode == 7, "the exit code is not the stage's own"
    assert became.stdout == "['--help', '-x', '--key=value', 'word']\n"


def _before_checkout(folder: Path) -> str:
    return f"{folder}{os.pathsep}{Path(__file__).parents[2]}"


def test_a_stage_that_is_not_installed_is_named_with_the_way_out() -> None:
    with pytest.raises(NotHere, match=r"`no_such_stage` is not part of the wheel.*checkout"):
        stages.become("no_such_stage")
    with pytest.raises(NotHere, match=r"no_such_package\.stage"):
        stages.become("no_such_package.stage")
