"""`accrual models`: what it says of real cycles, and that a generation can be made again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from typer.testing import CliRunner

from accrual.bundle import read_manifest
from accrual.kafka import TopicNames, read_to_end
from accrual.lake import open_lake_for_writing
from consumers.rows import arrow_tables, readers
from tests.trainer.world import STREAM, World
from trainer import rebuild
from trainer.models import app
from trainer.select import Selection


def told(world: World) -> None:
    """What the trainer has said is in the lake, as the sink puts it there."""
    names = TopicNames(world.config.topics.prefix)
    said = [*read_to_end(world.config, names.models), *read_to_end(world.config, names.training)]
    tables, skipped = arrow_tables(said, readers(names, world.contracts))
    assert not skipped
    with open_lake_for_writing(world.config) as lake:
        lake.append(tables)


def hold_out(world: World) -> None:
    contract = world.contracts[STREAM]
    training = msgspec.structs.replace(contract.training, held_out=0.12)
    world.contracts[STREAM] = msgspec.structs.replace(contract, training=training)
    path = Path(world.config.contracts) / "desk.yaml"
    path.write_text(path.read_text().replace("held_out: 0,", "held_out: 0.12,"))


@pytest.fixture
def judged(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Generation 0, a first generation that was promoted on window 2, and a challenger that waits for window 3."""
    hold_out(world)
    for _ in range(2):
        world.seal()
        world.finish()
    told(world)
    for name, value in world.config.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")
    return world


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def rebuild_versions(world: World) -> dict[str, str]:
    bundle = next(g.bundle for g in world.said()[2] if g.version == 1)
    return read_manifest(world.config.model_store / bundle).made_with


@pytest.mark.slow
def test_a_ledger_is_told_from_list_to_page_and_a_generation_is_made_again(
    judged: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = json.loads(run("list", "--format", "json"))
    assert [(row["model"], row["state"], row["windows"], row["judged"]) for row in models] == [
        ("desk@0", "promoted", "-", "-"),
        ("desk@1", "in service", "1", "2"),
        ("desk@2", "trained", "1-2", "-"),
    ]
    assert models[1]["gain"] > 0 and models[1]["gain"] == models[1]["over 0"]

    shown = run("show", "desk@1")
    assert "outside: rows whose label is none of the model's classes" in shown
    assert "made to replace:  desk@0" in shown and "generation-0" in shown and "snapshot:" in shown
    line = json.loads(run("lineage", "desk@2", "--format", "json"))
    assert [row["model"] for row in line] == ["desk@2", "desk@1", "desk@0"]
    _, front, text = run("card", "desk@1").split("---\n", 2)
    [index] = yaml.safe_load(front)["model-index"]
    [trial] = [e for e in judged.said()[1] if e.model == "desk@1"]
    [result] = index["results"]
    assert (index["name"], result["dataset"]["name"]) == ("desk@1", f"desk, window 2, {trial.rows} rows")
    assert {m["type"]: m["value"] for m in result["metrics"]}["brier"] == pytest.approx(trial.brier, abs=1e-6)
    assert f"| 2 | {trial.rows} | {trial.brier:.4f} (" in text and "## Training data" in text and "## Use" in text
    assert "No window has judged it." in run("card", "desk@2")
    for arguments, said in (
        (("compare", "desk@1", "desk@1"), "name two models"),
        (("report", "desk@1", "--to", str(tmp_path / "none" / "x.html")), "there is no folder"),
        (("matrix", "--stream", STREAM, "--json", str(tmp_path)), "is a folder: name a file"),
        (("list", "--stream", "nope"), "there are contracts for desk"),
    ):
        assert said in str(CliRunner().invoke(app, arguments).exception)
    compared = json.loads(run("compare", "desk@1", "desk@0", "--format", "json"))
    assert [row["window"] for row in compared] == [1, 2] and all(1 <= row["rows"] < 20 for row in compared)

    matrix = tmp_path / "matrix.json"
    run("matrix", "--stream", STREAM, "--json", str(matrix))
    made = json.loads(matrix.read_text())
    assert (made["models"], made["learned"]) == (["desk@0", "desk@1"], [[False, False], [True, False]])
    assert made["gain"] > 0 and made["backward_transfer"] is None

    again = tmp_path / "again.json"
    contract = Path(judged.config.contracts) / "desk.yaml"
    contract.write_text(contract.read_text().replace("held_out: 0.12,", "held_out: 0.5,"))
    run("matrix", "--stream", STREAM, "--json", str(again))
    assert json.loads(again.read_text()) == made, "rows held out from now on are not those held out then"
    contract.write_text(contract.read_text().replace("held_out: 0.5,", "held_out: 0.12,"))

    page = tmp_path / "page.html"
    run("report", "desk@1", "--to", str(page))
    html = page.read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|<script", html)
    assert "What it still gets wrong" in html and html.count("<svg") == 3 and "Every generation on every window" in html
    if shutil.which("chromium"):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        dumped = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60)
        assert "<title>Accrual: desk@1</title>" in dumped.stdout

    assert "desk@1: the same digest" in run("rebuild", "desk@1")
    assert "desk@0: the same digest" in run("rebuild", "desk@0")
    monkeypatch.setattr(rebuild, "made_with", lambda: {**rebuild_versions(judged), "torch": "9.9"})
    changed = run("rebuild", "desk@1", code=1)
    assert "torch: " in changed and "9.9 now" in changed and "not made again" in changed
    monkeypatch.undo()

    real = rebuild.select

    def fewer(*given: Any) -> Selection:
        chosen = real(*given)
        return msgspec.structs.replace(chosen, rows=chosen.rows.slice(2))

    with monkeypatch.context() as patched:
        for name, value in judged.config.environment().items():
            patched.setenv(name, value)
        patched.setattr(rebuild, "select", fewer)
        assert "rows: 2 are gone (erased, or quarantined since), such as p-" in run("rebuild", "desk@1", code=1)
        unknown = CliRunner().invoke(app, ["show", "desk@9"]).exception
        assert "the lake knows desk@0, desk@1, desk@2" in str(unknown)


@pytest.mark.slow
def test_a_backtest_makes_again_what_the_trainer_made_window_by_window_and_says_nothing(
    judged: World, tmp_path: Path
) -> None:
    judged.seal()
    judged.finish()
    told(judged)
    runs, evaluations, generations = judged.said()
    folder = tmp_path / "backtest"
    shown = run("backtest", "--stream", STREAM, "--to", str(folder))
    found = json.loads((folder / "backtest.json").read_bytes())

    ended = {entry.model: (entry.run_id, entry.state, entry.digest) for entry in runs}
    again = {m["run"]["run_id"].split("-")[0]: m["run"] for m in found["models"] if m["run"]}
    assert {name: (r["run_id"], r["state"], r["digest"]) for name, r in again.items()} == ended
    verdicts = [(e.model, e.window, e.brier, e.e_value) for e in evaluations if e.role == "challenger"]
    trials = [t["challenger"] for m in found["models"] for t in m["trials"]]
    assert [(t["model"], t["window"], t["brier"], t["e_value"]) for t in trials] == verdicts and len(verdicts) > 1
    first = found["models"][1]
    assert first["published"]["published_at"] == "2025-01-05T00:00:00Z"  # window 2's end, and a day for its labels
    [after] = [one for one in found["afterwards"] if one["model"] == f"{STREAM}@1"]
    assert (after["replaced"], after["windows"]) == (f"{STREAM}@0", [3])
    assert after["low"] < after["gain"] < after["high"]
    assert "desk@1" in shown and (folder / "desk@1.html").exists()

    assert judged.said() == (runs, evaluations, generations)
    assert "is no empty folder" in str(
        CliRunner().invoke(app, ["backtest", "--stream", STREAM, "--to", str(folder)]).exception
    )
