"""The plan on a real lake: what triggers are told is what the lake and the ledger hold, and no model judges itself."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from accrual.contract import Contract, load_contract
from accrual.erasure import erase, subject_of
from accrual.errors import ContractError
from accrual.judged import judged
from accrual.lake import open_lake, open_lake_for_writing
from accrual.ledger import Evaluation, Generation, Run
from tests.trainer.books import START, STREAM, Books
from trainer.evaluate import Scored
from trainer.plan import Plan, gather, plan_of, rises_of, runs_before
from trainer.publish import Said
from trainer.select import Window, sealed_windows
from trainer.triggers import Facts

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def told(*entries: Run | Evaluation, champion: Generation | None = None) -> Said:
    """What the trainer has said, without the topics that it is read from."""
    said = Said()
    said.say(entries, champion)
    return said


def run(version: int, windows: list[int], state: str, at: datetime = NOW, **more: Any) -> Run:
    fields = {
        "run_id": f"r{version}",
        "stream": STREAM,
        "version": version,
        "parent": f"{STREAM}@0",
        "windows": windows,
        "snapshot_id": 1,
        "rows_new": 10,
        "rows_replayed": 0,
        "seed": 1,
        "digest": "d",
        "state": state,
        "reason": "",
        "seconds": 60.0,
        "at": at,
        **more,
    }
    return msgspec.convert(fields, Run)


def generation(version: int, windows: list[int], learned_until: datetime | None = None) -> Generation:
    return Generation(
        stream=STREAM,
        version=version,
        model=f"{STREAM}@{version}",
        digest="d",
        bundle="d",
        run_id=f"r{version}",
        parent=None,
        windows=windows,
        rows=10,
        published_at=NOW,
        learned_until=learned_until,
    )


def evaluation(
    version: int, window: int, role: Literal["challenger", "champion", "generation-0"], brier: float
) -> Evaluation:
    return Evaluation(
        stream=STREAM,
        run_id=f"r{version}",
        window=window,
        model=f"{STREAM}@{version}",
        role=role,
        rows=100,
        accuracy=0.5,
        auroc=None,
        brier=brier,
        log_loss=0.5,
        ece=0.3,
        calibration_error=0.1,
        coverage=1.0,
        at=NOW,
    )


@pytest.fixture
def books(tmp_path: Path) -> Books:
    """Three windows of ten rows, an hour each."""
    books = Books(tmp_path)
    for k in range(3):
        books.add(*({"id": f"p-{n:03d}", "at": n / 10, "label": "good"} for n in range(10 * k, 10 * k + 10)))
        books.seal(k + 1)
    return books


def planned(books: Books, said: Said, contract: Contract, by_hand: bool = False) -> tuple[Plan, Facts | None]:
    gathered: list[Facts] = []
    with open_lake(books.config) as lake:
        windows = sealed_windows(lake, STREAM)

        def facts_of(new: Sequence[Window]) -> Facts:
            gathered.append(gather(lake, said, contract, windows, new, lambda _: (0.01, 0.03)))
            return gathered[-1]

        plan = plan_of(said, contract, windows, facts_of, NOW, by_hand)
    return plan, gathered[0] if gathered else None


def numbers(plan: Plan) -> list[int]:
    return [window.window for window in plan.windows]


def test_what_is_new_since_the_last_run_is_counted_and_what_the_champion_has_not_seen_is_learned(books: Books) -> None:
    contract = books.contract("triggers: {rows: 20, every: 90m}")
    plan, facts = planned(books, told(), contract)
    assert (plan.step, numbers(plan)) == ("train", [1, 2, 3])
    assert facts is not None
    assert (facts.rows, facts.passed) == (30, timedelta(hours=2))

    lost = told(run(1, [1, 2], "rejected"), champion=generation(0, []))
    plan, facts = planned(books, lost, contract)
    assert facts is not None
    assert (facts.rows, facts.passed) == (10, timedelta(hours=1))
    assert (plan.step, plan.reason) == ("wait", "not yet: rows: 10 of 20; time: 1h of 1.5h")
    plan, _ = planned(books, lost, books.contract())
    assert (plan.step, numbers(plan), plan.reason) == ("train", [1, 2, 3], "a new sealed window")


def test_time_passes_from_the_end_of_the_first_window_which_begins_before_all_that_was(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books._from = datetime(1990, 1, 1, tzinfo=UTC)
    contract = books.contract("triggers: {every: 2h}")
    for k, passed in enumerate((0, 1, 2)):
        books.add(*({"id": f"p-{n:03d}", "at": n / 10, "label": "good"} for n in range(10 * k, 10 * k + 10)))
        books.seal(k + 1)
        plan, facts = planned(books, told(), contract)
        assert facts is not None and facts.passed == timedelta(hours=passed)
        assert plan.step == ("train" if passed == 2 else "wait"), plan.reason


def test_a_window_that_was_tried_is_not_tried_again_unless_a_person_asks(books: Books) -> None:
    lost = told(run(1, [1, 2, 3], "rejected"), champion=generation(0, []))
    assert planned(books, lost, books.contract())[0] == Plan("wait", [], "for a sealed window")
    plan, _ = planned(books, lost, books.contract(), by_hand=True)
    assert (plan.step, numbers(plan), plan.reason) == ("train", [1, 2, 3], "by hand")
    won = told(run(1, [1, 2, 3], "promoted"), champion=generation(1, [1, 2, 3]))
    plan, _ = planned(books, won, books.contract(), by_hand=True)
    assert (plan.step, numbers(plan)) == ("train", [3])
    open_one = told(run(1, [1, 2, 3], "trained"), champion=generation(0, []))
    assert planned(books, open_one, books.contract(), by_hand=True)[0].step == "wait"


def test_no_model_is_judged_on_a_time_of_which_it_or_its_champion_has_learned(books: Books) -> None:
    """Those that learned from young rows have seen some of the next windows."""
    contract = books.contract()
    first = run(1, [1], "trained")
    for challenger, champion, judge in (
        (first, generation(0, []), 2),
        (run(1, [1], "trained", learned_until=START + timedelta(hours=1)), generation(0, []), 2),
        (run(1, [1], "trained", learned_until=START + timedelta(hours=1.5)), generation(0, []), 3),
        (first, generation(0, [], START + timedelta(hours=1.5)), 3),
        (run(1, [1], "trained", learned_until=START + timedelta(hours=2.5)), generation(0, []), None),
    ):
        plan, _ = planned(books, told(challenger, champion=champion), contract)
        assert (plan.step, numbers(plan)) == (("judge", [judge]) if judge else ("wait", []))


def test_drift_is_the_largest_in_a_window_that_no_run_was_given(books: Books) -> None:
    at = START
    books.put(
        "quality",
        {"window": 1, "metric": "psi", "field": "label", "value": 9.0, "at": at},
        {"window": 2, "metric": "psi", "field": "text", "value": 8.0, "at": at},
        {"window": 2, "metric": "psi", "field": "text", "value": 0.2, "at": at + timedelta(hours=1)},
        {"window": 3, "metric": "psi", "field": "label", "value": 0.4, "at": at},
        {"window": 3, "metric": "jensen_shannon", "field": "label", "value": 7.0, "at": at},
        {"window": 4, "metric": "psi", "field": "label", "value": 6.0, "at": at},
    )
    said = told(run(1, [1], "rejected"), champion=generation(0, []))
    plan, facts = planned(books, said, books.contract("triggers: {drift: {most: 0.3}}"))
    assert facts is not None
    assert (facts.drift, facts.drift_of) == (0.4, "label")
    assert plan.reason == "drift: psi of label 0.4, of 0.3"
    plan, facts = planned(books, said, books.contract("triggers: {drift: {most: 0.3, field: text}}"))
    assert facts is not None
    assert (plan.step, facts.drift) == ("wait", 0.2)


def test_recalled_rows_were_relabeled_erased_or_put_in_quarantine_since_they_were_learned(
    books: Books,
) -> None:
    contract = books.contract("triggers: {recalled: 2}")
    said = told(run(1, [1, 2], "promoted"), champion=generation(1, [1, 2]))

    def recalled() -> int:
        plan, facts = planned(books, said, contract)
        assert facts is not None
        assert plan.step == ("train" if facts.recalled >= 2 else "wait")
        return facts.recalled

    assert recalled() == 0
    books.add({"id": "p-001", "at": 0.1, "label": "good", "revision": 2})  # the same label
    books.add({"id": "p-021", "at": 2.1, "label": "bad", "revision": 2})  # not of its windows
    assert recalled() == 0
    books.add({"id": "p-001", "at": 0.1, "label": "bad", "revision": 3})
    assert recalled() == 1
    with open_lake_for_writing(books.config) as lake:
        erase(lake, books.config, subject_of(books.config, contract, "p-012", "prediction_id"))
    assert recalled() == 2
    held = {"rule": "known_fault", "at": datetime.now(UTC) + timedelta(seconds=1)}
    books.put("quarantine", {"prediction_id": "p-002", "state": "held", "offset": 1, **held})
    assert recalled() == 3
    books.put("quarantine", {"prediction_id": "p-021", "state": "held", "offset": 2, **held})  # not of its windows
    books.put("quarantine", {"prediction_id": "p-001", "state": "held", "offset": 3, **held})  # relabeled: counted
    assert recalled() == 3
    books.put("quarantine", {"prediction_id": "p-002", "state": "released", "offset": 4, **held})
    assert recalled() == 2
    # A champion that learned after the revision was taught the label of today.
    books.seal(3.1)
    taught = told(run(2, [1, 2, 3, 4], "promoted"), champion=generation(2, [1, 2, 3, 4]))
    with open_lake(books.config) as lake:
        windows = sealed_windows(lake, STREAM)
        assert gather(lake, taught, contract, windows, windows[-1:], lambda _: (None, None)).recalled == 0


def test_the_gain_of_a_run_is_what_its_model_saved_once_it_was_published() -> None:
    said = told(
        run(1, [1], "promoted"),
        evaluation(1, 2, "challenger", 0.30),
        evaluation(1, 2, "champion", 0.40),
        evaluation(1, 2, "generation-0", 0.40),
        run(2, [1, 2], "rejected"),
        evaluation(2, 3, "challenger", 0.20),
        evaluation(2, 3, "champion", 0.30),
        run(3, [1, 2, 3], "trained"),
    )
    assert [before.gain for before in runs_before(said, STREAM)] == [pytest.approx(0.1), 0.0, None]


def test_a_champion_has_declined_by_what_it_is_worse_than_on_the_last_window_that_judged_it() -> None:
    """By Brier score and calibration error; nothing is known of a generation 0, nor scored for it."""
    asked: list[tuple[str, Window]] = []
    # Half of what it calls certain does not happen: a Brier score of 1, an ECE of 0.5, of which chance is a part.
    now = judged(np.array([[0.0, 1.0]] * 4), np.array([1, 1, 0, 0]))

    def scored(champion: Generation, window: Window) -> Scored:
        asked.append((champion.model, window))
        none = np.zeros(4, dtype=np.int32)
        return Scored(champion.model, window, pa.chunked_array([["a", "b", "c", "d"]]), now, [()], none, np.ones(4))

    on = Window(STREAM, 5, 1, START, NOW, 1.0, 4)
    trials = [evaluation(1, w, role, brier) for w, brier in ((2, 0.6), (3, 0.4)) for role in ("challenger", "champion")]
    trials += [evaluation(2, 4, "challenger", 0.1)]
    rises = rises_of(told(*trials, champion=generation(1, [1])), STREAM, scored, on)
    assert rises == pytest.approx((0.6, now.calibration_error - 0.1))
    assert now.calibration_error < now.ece == 0.5
    assert asked == [(f"{STREAM}@1", on)]
    assert rises_of(told(champion=generation(0, [])), STREAM, scored, on) == (None, None)
    assert rises_of(told(), STREAM, scored, on) == (None, None)
    assert len(asked) == 1


def test_a_challenger_is_counted_unless_it_failed_before_it_was_judged() -> None:
    states = ["rejected", "failed", "failed", "promoted", "trained"]
    runs = [run(version, [version], state) for version, state in enumerate(states, start=1)]
    said = told(*runs, evaluation(3, 4, "challenger", 0.0))
    assert [said.trial(one) for one in runs] == [1, 2, 2, 3, 4]


def test_the_time_of_a_run_is_when_it_was_said_first() -> None:
    said = told(run(1, [1], "trained"), run(1, [1], "promoted", at=NOW + timedelta(days=40)))
    assert [before.at for before in runs_before(said, STREAM)] == [NOW]


@pytest.mark.parametrize(
    ("triggers", "problem"),
    [
        ("{rows: 0}", r"triggers\.rows: must be at least 1"),
        ("{runs_per_day: 0}", r"triggers\.runs_per_day: must be at least 1"),
        ("{every: soon}", r"triggers\.every: 'soon' is not a duration"),
        ("{cooldown: 1}", "Expected `str | null`, got `int`"),
        ("{drift: {most: 0}}", r"triggers\.drift\.most: must be above 0"),
        ("{drift: {most: 0.2, field: textt}}", r"triggers\.drift\.field: must be one of text, queue"),
        ("{drift: {most: 0.2, metric: violations}}", "Invalid enum value"),
        ("{decline: {}}", r"triggers\.decline: give brier, ece or both"),
        ("{decline: {brier: -0.1}}", r"triggers\.decline: give brier, ece or both, above 0"),
        ("{least_gain: 0}", r"triggers\.least_gain: must be above 0"),
        ("{row: 10}", "unknown field `row`"),
    ],
)
def test_a_trigger_that_makes_no_sense_is_named(tmp_path: Path, triggers: str, problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        Books(tmp_path).contract(f"triggers: {triggers}")


def test_drift_needs_what_measures_it(tmp_path: Path) -> None:
    books = Books(tmp_path)
    books.contract("triggers: {drift: {most: 0.2}}")
    path = books.folder / "cases.yaml"
    path.write_text(path.read_text().replace("quality: {slices: [queue]}", ""))
    with pytest.raises(ContractError, match=r"is measured by `quality`: add that section, it may be `\{\}`"):
        load_contract(path)
