"""The commands of `accrual` as a user runs them: exit codes, messages, help with examples."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def accrual(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from accrual.cli import main; main()", *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_contract_is_checked_and_said_in_words() -> None:
    done = accrual("contract", "check", "schemas/contracts/credit-risk.yaml")
    assert done.returncode == 0
    assert "after 548d is labeled 'paid'" in done.stdout


def test_when_a_stream_is_trained_is_said_in_words_and_unripe_labels_are_warned_against(tmp_path: Path) -> None:
    text = (ROOT / "schemas/contracts/credit-risk.yaml").read_text()
    assert "a training cycle on each." in accrual("contract", "check", "schemas/contracts/support-intents.yaml").stdout
    path = tmp_path / "hasty.yaml"
    path.write_text(text.replace("{rows: 10000}", "{every: 30d, rows: 500}\n  cohort: observed"))
    done = accrual("contract", "check", str(path))
    assert done.returncode == 0
    assert "a training cycle when one of its triggers says so (rows, every)." in done.stdout
    assert "warning: `training.cohort: observed` teaches the shares of labels that come early" in done.stderr


def test_a_rule_for_labels_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "ranked.yaml"
    text = (ROOT / "schemas/contracts/support-intents.yaml").read_text()
    rule = "field: intent\n  take: majority\n  complete_when: 3\n  sources: [agent, click]"
    path.write_text(text.replace("field: intent", rule))
    done = accrual("contract", "check", str(path))
    assert "the label is what most outcomes say by values.intent, by the best source of agent, click" in done.stdout
    assert "once 3 outcomes count." in done.stdout


def test_a_contract_that_breaks_its_stream_is_refused_with_each_reason(tmp_path: Path) -> None:
    before = ROOT / "schemas/contracts/credit-risk.yaml"
    path = tmp_path / "credit-risk.yaml"
    path.write_text(
        before.read_text().replace("horizon: 548d", "horizon: 600d").replace("on_expiry: paid", "on_expiry: censored")
    )
    for against in (before, before.parent):
        done = accrual("contract", "check", str(path), "--against", str(against))
        assert done.returncode == 1
        assert "horizon: changed" in done.stderr
        assert "on_expiry: changed" in done.stderr
    assert accrual("contract", "check", str(before), "--against", str(before.parent)).returncode == 0


def test_a_broken_contract_ends_with_line_and_fix(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text((ROOT / "schemas/contracts/credit-risk.yaml").read_text().replace("horizon: 548d", "horizon: 18m0"))
    done = accrual("contract", "check", str(path))
    assert done.returncode == 1
    assert "horizon" in done.stderr
    assert "write a whole number and a unit" in done.stderr
    assert "Traceback" not in done.stderr


def test_topics_are_created_listed_and_without_a_broker_the_fix_is_named(bootstrap: str, prefix: str) -> None:
    env = {"ACCRUAL_KAFKA_BOOTSTRAP_SERVERS": bootstrap, "ACCRUAL_TOPICS_PREFIX": prefix}
    assert accrual("topics", "list", env=env).returncode == 1
    assert f"{prefix}.predictions" in accrual("topics", "create", env=env).stdout
    assert accrual("topics", "create", env=env).stdout == "All topics are there.\n"
    assert accrual("topics", "list", env=env).returncode == 0
    nobody = accrual("topics", "list", env={"ACCRUAL_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:9"})
    assert nobody.returncode == 1
    assert "accrual broker start" in nobody.stderr
    assert nobody.stderr.count("\n") == 1


def test_configuration_is_shown_without_secrets() -> None:
    env = {"ACCRUAL_LAKE_CATALOG": "postgres:password=hunter2", "ACCRUAL_KAFKA_CLIENT_SASL_PASSWORD": "hunter2"}
    done = accrual("config", env=env)
    assert done.returncode == 0
    assert "hunter2" not in done.stdout
    assert "lake.catalog = (set)" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "broker start",
        "broker status",
        "contract check",
        "topics create",
        "topics list",
        "sql",
        "export",
        "erase",
        "config",
        "version",
    ],
)
def test_help_has_an_example(command: str) -> None:
    done = accrual(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert f"accrual {command}" in done.stdout


def test_wrong_usage_is_exit_code_2() -> None:
    assert accrual("contract", "check").returncode == 2
    assert accrual("nonsense").returncode == 2
