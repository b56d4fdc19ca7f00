"""Cycles on a real lake, a real broker and the real base model: challengers are frozen before they are judged, what
loses is recorded, and a trainer that is killed at any step repeats nothing that was said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from accrual.bundle import ROWS, read_manifest, verify_bundle
from accrual.contract import load_contracts
from accrual.errors import ContractError
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_tables import TABLES
from accrual.ledger import Generation, Run
from accrual.predictor import Predictor
from accrual.training_policy import Retention, Slices
from tests.trainer.world import START, STREAM, World
from trainer import challenger, cycle
from trainer.backtest import apart, backtest
from trainer.dry_run import foretell
from trainer.freeze import find_frozen
from trainer.gate import LARGEST_LOSS, Verdict
from trainer.publish import Ledger, Said
from trainer.rebuild import rebuild
from trainer.select import Selection, held_out_rows, rows_of, sealed_windows, select

PAIRS = Path(__file__).parents[2] / "trainer" / "probes" / "stsb.csv"


def test_a_challenger_is_frozen_judged_on_the_next_window_and_published(world: World) -> None:
    world.finish()
    runs, evaluations, generations = world.said()
    assert (runs, evaluations) == ([], [])
    assert [g.model for g in generations] == ["desk@0"]

    world.seal()
    world.finish()
    runs, evaluations, generations = world.said()
    assert [(r.version, r.state, r.windows) for r in runs] == [(1, "trained", [1])]
    assert evaluations == []
    digest = runs[0].digest or ""

    world.seal()
    world.finish()
    runs, evaluations, generations = world.said()
    assert [r.state for r in runs if r.version == 1] == ["trained", "promoted"], runs[1].reason
    assert all(r.digest == digest for r in runs if r.version == 1), "frozen before the window that judged it"
    assert {(e.model, e.role, e.window) for e in evaluations} == {
        ("desk@1", "challenger", 2),
        ("desk@0", "champion", 2),
        ("desk@0", "generation-0", 2),
    }
    assert generations[-1].model == "desk@1"
    assert generations[-1].windows == [1]
    assert [(r.version, r.windows, r.rows_replayed) for r in runs if r.version == 2] == [(2, [1, 2], 30)]
    judged = {e.role: e for e in evaluations}
    assert judged["challenger"].brier < judged["champion"].brier
    low, high = judged["challenger"].intervals["brier"]
    assert low < judged["challenger"].brier < high
    assert sum(b.rows for b in judged["challenger"].reliability) == judged["challenger"].rows

    folder = world.config.model_store / generations[-1].bundle
    manifest = verify_bundle(folder, world.config.public_key)
    assert (manifest.parent, manifest.windows, manifest.rows_new) == ("desk@0", [1], 60)
    rows = pq.read_table(folder / ROWS).to_pylist()
    assert {row["prediction_id"] for row in rows} == {f"p-{n}" for n in range(60)}
    assert Counter(row["part"] for row in rows) == {"new": 53, "calibrate": 7}
    assert ROWS in manifest.files
    assert manifest.selection == runs[-1].selection | {"new": 53, "replay": 0}
    [output] = Predictor.load(folder, world.config).predict([{"text": "What is the exchange rate today?"}])
    assert output.label == "exchange_rate"
    assert sum(output.probabilities.values()) == pytest.approx(1.0, abs=1e-4)


def test_a_trainer_that_fell_behind_learns_from_the_newest_rows_and_a_sample_of_the_others(world: World) -> None:
    for _ in range(4):
        world.seal()
    contract = world.contracts[STREAM]
    few = msgspec.structs.replace(
        contract, training=msgspec.structs.replace(contract.training, max_rows=80, replay=1.0)
    )
    with open_lake(world.config) as lake:
        windows = sealed_windows(lake, STREAM)
        chosen = select(lake, few, windows, seed=1)
        again = select(lake, few, windows, seed=1)
        other = select(lake, few, windows, seed=2)
        newest = [row.prediction_id for window in windows for row in rows_of(lake, few, window)][-80:]
    ids = [row.prediction_id for row in (*chosen.learn, *chosen.calibrate)]
    assert len(ids) == len(set(ids)) == 160
    assert (chosen.new, chosen.replayed) == (80, 80)
    assert set(newest) <= set(ids)
    assert [row.prediction_id for row in chosen.calibrate] == newest[-len(chosen.calibrate) :]
    assert again.digest == chosen.digest != other.digest


def test_rows_that_are_held_out_are_never_learned_from_and_are_the_same_in_every_run(world: World) -> None:
    for _ in range(4):
        world.seal()
    contract = world.contracts[STREAM]
    some = msgspec.structs.replace(contract, training=msgspec.structs.replace(contract.training, held_out=0.3))
    with open_lake(world.config) as lake:
        windows = sealed_windows(lake, STREAM)
        held_out = {row.prediction_id for window in windows for row in held_out_rows(lake, some, window)}
        chosen = select(lake, some, windows[2:], seed=1)
        first = select(lake, some, windows[:1], seed=2)
        everything = {row.prediction_id for window in windows for row in rows_of(lake, some, window)}
    learned = {row.prediction_id for of in (chosen, first) for row in (*of.learn, *of.calibrate)}
    assert 0.2 < len(held_out) / len(everything) < 0.4
    assert held_out < everything and not held_out & learned
    with open_lake(world.config) as lake:
        assert not list(held_out_rows(lake, contract, windows[0])), "the contract holds none back"


def test_what_is_in_quarantine_is_learned_from_only_once_it_is_released(world: World) -> None:
    world.seal()
    entry = {"stream": STREAM, "window": 1, "rule": "r", "detail": "", "at": START}
    decided = {
        "p-3": ["quarantined"],
        "p-4": ["quarantined", "rejected"],
        "p-5": ["quarantined", "rejected", "released"],
    }
    rows = [
        entry | {"prediction_id": prediction_id, "state": state, "offset": n - 1}
        for prediction_id, states in decided.items()
        for n, state in enumerate(states)
    ]
    rows.append(entry | {"prediction_id": "p-5", "rule": "other", "state": "released", "offset": 9})
    rows.append(entry | {"prediction_id": "p-6", "stream": "another", "state": "quarantined", "offset": -1})
    with open_lake_for_writing(world.config) as lake:
        lake.append({"quarantine": pa.Table.from_pylist(rows, TABLES["quarantine"])})
        chosen = select(lake, world.contracts[STREAM], sealed_windows(lake, STREAM), seed=1)
    ids = {row.prediction_id for row in (*chosen.learn, *chosen.calibrate)}
    assert ids == {f"p-{n}" for n in range(60)} - {"p-3", "p-4"}


def test_a_challenger_that_learned_nonsense_is_rejected_and_the_next_may_learn_better(world: World) -> None:
    wrong = dict(zip(*[world.contracts[STREAM].output.classes[n:] for n in (0, 1)], strict=False))
    world.seal(relabel=lambda label: wrong.get(label, "card_arrival"))
    world.finish()
    world.seal()
    world.finish()
    world.seal()
    world.finish()
    runs, _, generations = world.said()
    assert [r.state for r in runs if r.version == 1][-1] == "rejected"
    assert "desk@1" not in [g.model for g in generations]
    assert next(r.windows for r in runs if r.version == 2) == [1, 2], "its champion had seen neither"


@pytest.mark.parametrize("rows", [0, 1])
def test_a_window_that_teaches_nothing_is_a_recorded_failure_and_the_loop_goes_on(world: World, rows: int) -> None:
    world.seal(rows)
    world.finish()
    runs, _, _ = world.said()
    assert [r.state for r in runs] == (["failed"] if rows else [])
    world.seal()
    world.finish()
    runs, _, _ = world.said()
    assert runs[-1].state == "trained"


@pytest.mark.parametrize("model", ["desk@1", "desk@0"])
def test_no_row_judges_a_model_that_learned_from_it(world: World, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Neither challenger nor champion: nothing is published, the run says which rows, and the loop goes on."""
    world.seal()
    world.finish()

    def learned(store: Path, digest: str) -> set[str]:
        return {"p-1", "p-61", "p-70"} if read_manifest(store / digest).model == model else {"p-1"}

    monkeypatch.setattr("trainer.evaluate.ids_learned_from", learned)
    world.seal()
    world.finish()
    runs, evaluations, generations = world.said()
    [failed] = [r for r in runs if r.version == 1 and r.state != "trained"]
    assert failed.state == "failed"
    assert f"2 of the judged rows are among those that {model} learned from, first p-61, p-70" in failed.reason
    assert (evaluations, [g.version for g in generations]) == ([], [0])
    assert (runs[-1].version, runs[-1].state) == (2, "trained")


def test_a_challenger_that_loses_what_the_base_could_do_is_a_recorded_failure(world: World) -> None:
    probe = world.config.state_dir / "probe.csv"
    probe.write_text("".join(PAIRS.read_text(encoding="utf-8").splitlines(keepends=True)[:60]))
    contract = world.contracts[STREAM]

    def step(most_loss: float, learning_rate: float) -> Run:
        gate = msgspec.structs.replace(contract.gate, retention=Retention(str(probe), most_loss))
        training = msgspec.structs.replace(contract.training, learning_rate=learning_rate)
        world.contracts[STREAM] = msgspec.structs.replace(contract, gate=gate, training=training)
        world.seal()
        world.finish()
        return world.said()[0][-1]

    failed, trained = step(0.01, learning_rate=0.1), step(0.5, learning_rate=0.001)
    assert failed.state == "failed"
    assert "abilities are lost" in failed.reason
    assert trained.state == "trained"
    manifest = read_manifest(world.config.model_store / (trained.digest or ""))
    assert (manifest.adapter_scale, manifest.retention) == (1.0, trained.retention)
    assert trained.retention is not None
    probe.write_text(probe.read_text().replace("5.0", "4.0"))
    again = rebuild(world.config, trained.digest or "")
    assert again.changed == [f"gate.retention.probe: the file '{probe}' is another than then"]
    probe.unlink()
    [gone] = rebuild(world.config, trained.digest or "").changed
    assert gone.startswith("gate.retention.probe") and "cannot be read" in gone


def test_a_probe_that_is_not_there_is_said_when_the_trainer_starts(world: World) -> None:
    contract = world.contracts[STREAM]
    gate = msgspec.structs.replace(contract.gate, retention=Retention("/nowhere.csv"))
    world.contracts[STREAM] = msgspec.structs.replace(contract, gate=gate)
    with pytest.raises(ContractError, match=r"gate\.retention\.probe"):
        world.trainer()


def test_triggers_hold_runs_back_and_say_what_set_one_off_and_a_person_may_ask(world: World) -> None:
    path = Path(world.config.contracts) / "desk.yaml"
    path.write_text(path.read_text().replace("epochs: 1,", "epochs: 1, triggers: {rows: 100},"))
    world.contracts = load_contracts(Path(world.config.contracts))
    world.seal()
    world.finish()
    assert world.said()[0] == [], "60 rows of 100"
    world.seal()
    world.finish()
    runs, _, _ = world.said()
    assert [(r.version, r.windows, r.trigger) for r in runs] == [(1, [1, 2], "rows: 120 of 100")]
    assert runs[0].selection["new"] + runs[0].selection["calibrate"] == runs[0].rows_new

    world.seal()
    trainer = world.trainer()
    trainer.ask_for(STREAM)
    assert trainer.next_step(STREAM), "the challenger is judged first"
    assert trainer.next_step(STREAM)
    assert not trainer.next_step(STREAM), "once is enough"
    runs, _, _ = world.said()
    assert [r.trigger for r in runs if r.version == 2] == ["by hand"]


def test_who_asks_for_a_run_that_fails_has_asked_once(world: World) -> None:
    world.seal(rows=1)
    trainer = world.trainer()
    trainer.ask_for(STREAM)
    assert trainer.next_step(STREAM)
    assert not trainer.next_step(STREAM)
    assert [r.state for r in world.said()[0]] == ["failed"]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(world: World) -> None:
    trainer = world.trainer()
    contract = world.contracts[STREAM]

    def foretold(by_hand: bool = False) -> str:
        before, files = world.said(), sorted(world.config.state_dir.rglob("*.json"))
        told = Said()
        told.read(world.config)
        said = foretell(world.config, told, contract, by_hand)
        assert world.said() == before
        assert sorted(world.config.state_dir.rglob("*.json")) == files
        return said

    assert foretold() == "desk: would wait: for a sealed window"
    world.seal()
    expected = "desk: would train desk@1 on window 1, set off by {}\n  rows: 53 new, 7 to calibrate"
    assert foretold() == expected.format("a new sealed window")
    assert foretold(by_hand=True) == expected.format("by hand")
    assert trainer.next_step(STREAM), "it was not fenced"
    assert foretold() == "desk: would wait: for a sealed window, which judges desk@1"
    world.seal()
    assert foretold() == "desk: would judge: window 2 judges desk@1"


class _Killed(BaseException):
    """Stands for `kill -9`: nothing in the trainer handles it."""


STEPS = ["select", "fine_tune", "calibrate", "freeze", "freeze_generation_0", "score_window", "judge"]


def test_killed_at_every_step_nothing_is_said_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each step, and before and after each conclusion, the trainer dies once and is started again."""
    died: set[tuple[str, str]] = set()

    def deadly(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            if (name, "before") not in died:
                died.add((name, "before"))
                raise _Killed
            result = real(*arguments, **named)
            if (name, "after") not in died:
                died.add((name, "after"))
                raise _Killed
            return result

        return step

    for name in STEPS:
        where = cycle if hasattr(cycle, name) else challenger
        monkeypatch.setattr(where, name, deadly(name, getattr(where, name)))
    monkeypatch.setattr(Ledger, "say", deadly("say", Ledger.say))
    for _ in range(3):
        world.seal()
        while True:
            try:
                world.finish()
            except _Killed:
                continue
            break
    assert died == {(name, when) for name in [*STEPS, "say"] for when in ("before", "after")}
    runs, evaluations, generations = world.said()
    assert len({(r.version, r.state) for r in runs}) == len(runs)
    assert len({(e.run_id, e.window, e.role) for e in evaluations}) == len(evaluations)
    assert len({g.version for g in generations}) == len(generations)
    assert [g.version for g in generations] == sorted(g.version for g in generations)
    assert max(r.version for r in runs) >= 2


def test_a_training_that_was_broken_off_goes_on_with_its_windows_though_more_are_sealed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given = challenger.fine_tune, []

    def killed_once(*arguments: Any, **named: Any) -> Any:
        given.append(named["checkpoint"])
        if len(given) == 1:
            raise _Killed
        return real(*arguments, **named)

    monkeypatch.setattr(challenger, "fine_tune", killed_once)
    world.seal()
    with pytest.raises(_Killed):
        world.finish()
    world.seal()
    world.finish()
    runs, evaluations, _ = world.said()
    assert runs[0].windows == [1]
    assert given[0] == given[1], "the same checkpoint"
    assert {e.window for e in evaluations if e.role == "challenger"} == {2}, "and the window sealed since judges it"


def test_a_bundle_that_was_frozen_and_not_said_is_found_though_more_windows_are_sealed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Ledger.say

    def killed(ledger: Ledger, entries: Sequence[Any], champion: Generation | None = None) -> None:
        if entries:
            raise _Killed
        real(ledger, entries, champion)

    world.seal()
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "say", killed)
        with pytest.raises(_Killed):
            world.finish()
    [frozen] = [one for one in world.config.model_store.glob("[!.]*") if read_manifest(one).version == 1]
    world.seal()
    world.finish()
    runs, evaluations, _ = world.said()
    assert (runs[0].digest, runs[0].windows) == (frozen.name, [1])
    assert {e.window for e in evaluations if e.role == "challenger"} == {2}


def test_a_bundle_that_was_being_written_when_the_trainer_died_is_none(world: World) -> None:
    world.seal()
    world.finish()
    [run] = world.said()[0]
    store = world.config.model_store
    rows = read_manifest(store / str(run.digest)).rows_digest
    assert find_frozen(store, run.run_id, rows) == run.digest
    assert find_frozen(store, run.run_id, "of other rows") is None, "some were erased since"
    (store / str(run.digest)).rename(store / ".draft-1")
    assert find_frozen(store, run.run_id, rows) is None


def test_the_gate_is_asked_about_what_both_models_said_of_each_row(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    real = cycle.judge

    def listening(*arguments: Any) -> Verdict:
        asked.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(cycle, "judge", listening)
    monkeypatch.setattr("trainer.select.control_weight", lambda _, given: 0.5 if len(given["text"]) % 2 else 1.0)
    contract = world.contracts[STREAM]
    gate = msgspec.structs.replace(contract.gate, alpha=1e-6, patience=1, slices=Slices(fields=["text"], least_rows=10))
    world.contracts[STREAM] = msgspec.structs.replace(contract, gate=gate)
    for _ in range(3):
        world.seal()
        world.finish()
    _, evaluations, _ = world.said()
    assert [trial for _, trial, *_ in asked] == [1, 2], "alpha is spent over challengers"
    for window, (gains, _, rise, _, slices, losses, counts) in zip((2, 3), asked, strict=True):
        ours, theirs = (
            next(e for e in evaluations if (e.window, e.role) == (window, role)) for role in ("challenger", "champion")
        )
        assert gains[0].mean() == pytest.approx(theirs.brier - ours.brier)
        assert rise == pytest.approx(ours.calibration_error - theirs.calibration_error)
        assert losses == [LARGEST_LOSS]
        assert set(counts[0].tolist()) == {0.5, 1.0}
        assert sum(len(of_one) for of_one in slices.values()) == len(gains[0]) == ours.rows


def test_what_balancing_shifts_is_added_to_the_head_and_taken_off_where_a_warm_start_begins(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainers, one with a shift: it learns the same, from the base and from a champion, and says it shifted."""
    contract, chosen = world.contracts[STREAM], cycle.select
    warm = msgspec.structs.replace(contract.training, start="champion")
    contracts = {STREAM: msgspec.structs.replace(contract, training=warm)}
    world.seal()
    world.seal()
    heads: dict[float, list[Mapping[str, np.ndarray]]] = {}
    for shift in (0.0, 0.3):

        def shifted(*given: Any, by: float = shift) -> Selection:
            return msgspec.structs.replace(chosen(*given), shift={"exchange_rate": by})

        monkeypatch.setattr(cycle, "select", shifted)
        config = apart(world.config, tmp_path / str(shift))
        [zero, first, second] = backtest(config, contracts[STREAM], lambda windows: windows)
        assert (zero.state, first.state, second.state) == ("promoted", "promoted", "trained")
        bundles = [config.model_store / (one.bundle or "") for one in (first, second)]
        assert [read_manifest(folder).start for folder in bundles] == ["base", "champion"]
        heads[shift] = [load_file(folder / "head.safetensors") for folder in bundles]
        if not shift:
            assert rebuild(config, bundles[1].name).digest == bundles[1].name, "a warm start can be made again, too"
    place = contract.output.classes.index("exchange_rate")
    for plain, moved in zip(heads[0.0], heads[0.3], strict=True):
        expected = plain["bias"].copy()
        expected[place] += 0.3
        assert moved["bias"] == pytest.approx(expected, abs=1e-4)
        assert moved["weight"] == pytest.approx(plain["weight"], abs=1e-4)


def test_a_second_trainer_fences_the_first(world: World) -> None:
    from accrual.errors import BrokerUnavailable

    first = world.trainer()
    world.finish()
    world.seal()
    with pytest.raises(BrokerUnavailable, match="cannot be written"):
        first.next_step(STREAM)
    world.finish()
    runs, _, generations = world.said()
    assert [r.state for r in runs] == ["trained"]
    assert len(generations) == 1
