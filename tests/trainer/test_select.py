"""Selection on a real lake: what is chosen, what is not and why, and that the same snapshot gives the same choice."""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta
from math import exp, log
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from accrual import lake
from accrual.contract import Contract, load_contract
from accrual.erasure import erase, subject_of
from accrual.errors import ContractError
from accrual.events import encode
from accrual.lake import open_lake, open_lake_for_writing
from tests.trainer.books import START, STREAM, Books
from trainer.freeze import write_rows
from trainer.select import Selection, _read, held_out_rows, rows_of, sealed_windows, select
from trainer.weigh import weight_by_label


@pytest.fixture
def books(tmp_path: Path) -> Books:
    return Books(tmp_path)


def chosen(books: Books, contract: Contract, last: int = 1, seed: int = 1) -> Selection:
    """Selected as the trainer does it: the `last` windows are new, the lake is pinned to the newest one's snapshot."""
    with open_lake(books.config) as lake:
        windows = sealed_windows(lake, STREAM)
    with open_lake(books.config, at_snapshot=windows[-1].snapshot_id) as lake:
        return select(lake, contract, windows[-last:], seed)


def ids(selection: Selection, part: str) -> set[str]:
    rows = selection.rows.to_pylist()
    return {row["prediction_id"] for row in rows if row["part"] == part and row["weight"] > 0}


def simple(n: int, first: int = 0, label: str = "good", **more: object) -> list[dict[str, object]]:
    """`n` cases, one each tenth of an hour."""
    return [{"id": f"p-{first + k:03d}", "at": (first + k) / 10, "label": label, **more} for k in range(n)]


def test_the_list_of_rows_says_part_revision_and_weight_of_each(books: Books, tmp_path: Path) -> None:
    books.add(*simple(50))
    books.seal(5)
    books.add(*simple(50, 50, "bad"))
    books.add({"id": "p-050", "at": 5.0, "label": "good", "revision": 2})
    books.seal(10)
    selection = chosen(books, books.contract("replay: 0.5"))
    assert selection.counts == {"new": 44, "calibrate": 6, "replay": 25, "merged": 0}
    assert ids(selection, "new") | ids(selection, "calibrate") == {f"p-{n:03d}" for n in range(50, 100)}
    assert ids(selection, "calibrate") == {f"p-{n:03d}" for n in range(94, 100)}
    [revised] = [row for row in selection.rows.to_pylist() if row["prediction_id"] == "p-050"]
    assert revised == {"prediction_id": "p-050", "revision": 2, "label": "good", "part": "new", "weight": 1.0}
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for file in files:
        write_rows(file, chosen(books, books.contract("replay: 0.5")).rows)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert pq.read_table(files[0]).to_pylist() == selection.rows.to_pylist()


def test_a_label_that_changed_after_its_window_was_sealed_is_learned_as_it_is_by_the_next(books: Books) -> None:
    books.add(*simple(10))
    books.seal(1)
    books.add({"id": "p-003", "at": 0.3, "label": "bad", "revision": 2})
    before = chosen(books, books.contract("replay: 10"))
    books.add(*simple(10, 10))
    books.seal(2)
    after = chosen(books, books.contract("replay: 10"))
    label = {row["prediction_id"]: row["label"] for row in before.rows.to_pylist()}
    assert label["p-003"] == "good", "read as it was when the window was sealed"
    label = {row["prediction_id"]: row["label"] for row in after.rows.to_pylist()}
    assert label["p-003"] == "bad"
    assert set(label) == {f"p-{n:03d}" for n in range(20)}


def test_an_erased_row_is_learned_from_neither_as_new_nor_as_old_nor_when_it_comes_again(books: Books) -> None:
    books.add(*simple(10))
    books.seal(1)
    books.add(*simple(10, 10))
    books.seal(2)
    contract = books.contract("replay: 10")
    for gone in ("p-003", "p-013"):
        with open_lake_for_writing(books.config) as lake:
            erase(lake, books.config, subject_of(books.config, contract, gone, "prediction_id"))
    rest = {f"p-{n:03d}" for n in range(20)} - {"p-003", "p-013"}
    selection = chosen(books, contract)
    assert {row["prediction_id"] for row in selection.rows.to_pylist()} == rest
    again = [{"id": gone, "at": at, "label": "bad", "revision": 2} for gone, at in (("p-003", 0.3), ("p-013", 1.3))]
    books.add(*again)  # the join still had it: its row comes, and no prediction
    books.add(*simple(10, 20))
    books.seal(3)
    selection = chosen(books, contract, last=2)
    assert {row["prediction_id"] for row in selection.rows.to_pylist()} == rest | {f"p-{n:03d}" for n in range(20, 30)}
    assert selection.counts["erased"] == 1


def test_what_was_left_out_is_counted_by_reason(books: Books) -> None:
    books.add(
        *simple(20, inputs={"held_out": False}),
        {"id": "kept", "at": 1.95, "label": "bad", "inputs": {"held_out": True}},
    )
    books.put("quarantine", {"prediction_id": "p-004", "rule": "r", "state": "quarantined", "offset": -1, "window": 1})
    books.seal(2)
    plain = chosen(books, books.contract())
    assert plain.counts["quarantined"] == 1
    assert "p-004" not in {row["prediction_id"] for row in plain.rows.to_pylist()}
    only = chosen(books, books.contract("control: {holdout: held_out, weight: 0}"))
    assert [row["prediction_id"] for row in only.rows.to_pylist()] == ["kept"]
    assert only.counts["exposed"] == 19


def test_held_out_rows_judge_only_if_they_count(books: Books) -> None:
    """Those of which the contract says that they count nothing, and labels that no model knows, judge nothing."""
    books.add(
        *simple(40, inputs={"held_out": False}),
        {"id": "kept", "at": 3.95, "label": "bad", "inputs": {"held_out": True}},
        {"id": "odd", "at": 3.96, "label": "ugly", "inputs": {"held_out": True}},
    )
    books.seal(4)
    contract = books.contract("control: {holdout: held_out, weight: 0}")
    training = msgspec.structs.replace(contract.training, held_out=0.999)
    contract = msgspec.structs.replace(contract, training=training)
    with open_lake(books.config) as lake:
        [window] = sealed_windows(lake, STREAM)
        assert [row.prediction_id for row in rows_of(lake, contract, window)] == ["kept"]
        assert [row.prediction_id for row in held_out_rows(lake, contract, window)] == ["kept"]
        counts = select(lake, contract, [window], 1).counts
    assert (counts["exposed"], counts["outside"], counts["held_out"]) == (40, 1, 1)


def test_rows_of_one_text_and_label_are_one_that_counts_as_many(books: Books) -> None:
    books.add(*simple(10, text="again"), *simple(10, 10), *simple(5, 20, "bad", text="again"))
    books.seal(10)
    selection = chosen(books, books.contract("replay: 0"))
    rows = {row["prediction_id"]: row["weight"] for row in selection.rows.to_pylist() if row["part"] == "new"}
    assert rows["p-009"] == 10.0
    assert [rows[f"p-{n:03d}"] for n in range(9)] == [0.0] * 9
    assert selection.counts["merged"] == 9 + 1
    assert weight_by_label(selection.learn) == {"good": 20.0, "bad": 2.0}
    assert len(selection.calibrate) == 3, "which are not merged: they are a sample as it comes"


def test_of_more_rows_than_wanted_the_newest_or_the_least_sure_are_taken(books: Books) -> None:
    books.add(
        *({"id": f"p-{n:03d}", "at": n / 10, "label": "good", "said": 0.5 + (n * 7 % 50) / 100} for n in range(50))
    )
    books.seal(5)
    newest = chosen(books, books.contract("replay: 0, max_rows: 20"))
    assert ids(newest, "new") | ids(newest, "calibrate") == {f"p-{n:03d}" for n in range(30, 50)}
    unsure = chosen(books, books.contract("replay: 0, max_rows: 20, prefer: uncertain"))
    assert ids(unsure, "calibrate") == ids(newest, "calibrate"), "calibrated on rows as they come"
    margins = {f"p-{n:03d}": n * 7 % 50 for n in range(48)}
    assert ids(unsure, "new") == set(sorted(margins, key=lambda i: margins[i])[:18])


def test_of_more_rows_than_wanted_those_of_rare_slices_are_taken_if_the_contract_says_so(books: Books) -> None:
    queues = {0: "rare", 1: "seldom", 2: "seldom", 3: "rare"}
    books.add(*(case | {"inputs": {"queue": queues.get(n % 10, "usual")}} for n, case in enumerate(simple(100))))
    held = [{"prediction_id": f"p-{n:03d}", "rule": "r", "state": "quarantined"} for n in range(3, 100, 10)]
    books.put("quarantine", *held)  # so they do not make the queue less rare
    books.seal(10)
    newest = chosen(books, books.contract("replay: 0, max_rows: 30"))
    rare = chosen(books, books.contract("replay: 0, max_rows: 30, prefer: rare"))
    assert ids(rare, "calibrate") == ids(newest, "calibrate") == {"p-097", "p-098", "p-099"}
    all_rare, all_seldom = set(range(0, 100, 10)), {n for n in range(100) if n % 10 in (1, 2)}
    assert ids(rare, "new") == {f"p-{n:03d}" for n in all_rare | set(sorted(all_seldom)[-17:])}


def test_a_value_that_is_missing_keeps_its_place_among_the_slices(books: Books) -> None:
    """`acted_on` alone and `held_out` alone are two slices, though both are one value of two."""
    acted, held = {"acted_on": True}, {"held_out": True}
    books.add(*(case | {"inputs": acted if n % 10 == 0 else held} for n, case in enumerate(simple(100))))
    books.seal(10)
    contract = books.contract("replay: 0, max_rows: 10, prefer: rare")
    quality = msgspec.structs.replace(contract.quality, slices=["acted_on", "held_out"])
    chosen_ids = ids(chosen(books, msgspec.structs.replace(contract, quality=quality)), "new")
    assert chosen_ids == {f"p-{n:03d}" for n in range(10, 100, 10)}


@pytest.mark.parametrize(("by", "most"), [("label", "bad"), ("slice", "rare")])
def test_older_rows_are_drawn_evenly_over_labels_or_slices_if_the_contract_says_so(
    books: Books, by: str, most: str
) -> None:
    rare = {"label": "bad"} if by == "label" else {"inputs": {"queue": "rare"}}
    books.add(*(case | (rare if n % 20 == 0 else {"inputs": {"queue": "usual"}}) for n, case in enumerate(simple(400))))
    books.seal(40)
    books.add(*simple(40, 400))
    books.seal(44)
    rare_ids = {f"p-{n:03d}" for n in range(0, 400, 20)}
    evenly = chosen(books, books.contract(f"replay: 1, replay_by: {by}"))
    at_random = chosen(books, books.contract("replay: 1"))
    assert evenly.replayed == at_random.replayed == 40
    assert len(ids(evenly, "replay") & rare_ids) == 20
    assert len(ids(at_random, "replay") & rare_ids) < 8
    if by == "label":
        # 36 new ones and 38 of 40 older ones would be good, had they been drawn at random; 36 and 20 are.
        assert evenly.shift["bad"] == pytest.approx(_log_ratio(2 / 76, 20 / 76))
        assert evenly.shift["good"] == pytest.approx(_log_ratio(74 / 76, 56 / 76))
    else:
        assert evenly.shift == {}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_older_rows_that_are_drawn_by_label_are_corrected_to_shares_by_what_each_counts(
    books: Books, weight: float
) -> None:
    """Of those that the model acted on all are good, of the control arm one in five is bad."""
    cases = [case | {"inputs": {"acted_on": n % 2 == 0}} for n, case in enumerate(simple(400))]
    books.add(*(case | ({"label": "bad"} if n % 10 == 1 else {}) for n, case in enumerate(cases)))
    books.seal(40)
    books.add(*simple(40, 400))
    books.seal(44)
    control = f"control: {{exposure: acted_on, weight: {weight}}}"
    contract = books.contract(f"replay: 2, replay_by: label, {control}")
    ratios = []
    for seed in range(10):
        evenly = chosen(books, contract, seed=seed)
        learned = weight_by_label(evenly.learn)
        ratios.append(learned["bad"] / learned["good"] * exp(evenly.shift["bad"] - evenly.shift["good"]))
    mass = 80 * (200 + 200 * weight) / (400 if weight else 200)  # of 80 rows of these that were drawn at random
    bad = mass * 40 / (200 + 200 * weight)
    assert sum(ratios) / 10 == pytest.approx(bad / (mass - bad + 36), rel=0.1)


def _log_ratio(natural: float, learned: float) -> float:
    return log(natural) - log(learned)


def test_the_same_snapshot_gives_the_same_choice_whatever_came_later_and_in_whatever_order(tmp_path: Path) -> None:
    cases = [
        case | {"label": "bad" if n % 3 == 0 else "good", "said": 0.5 + n % 40 / 100, "text": f"text {n % 90}"}
        for n, case in enumerate(simple(120))
    ]
    training = "replay: 0.7, max_rows: 40, prefer: uncertain, replay_by: label, balance: sqrt"
    digests = set()
    for k in range(2):
        books = Books(tmp_path / str(k))
        first, second = list(cases[:60]), list(cases[60:])
        random.Random(k).shuffle(first)
        random.Random(k).shuffle(second)
        books.add(*first)
        books.seal(6)
        books.add(*second)
        books.seal(12)
        digests.add(chosen(books, books.contract(training)).digest)
        books.add({"id": "p-003", "at": 0.3, "label": "bad", "revision": 2})
        digests.add(chosen(books, books.contract(training)).digest)
    assert len(digests) == 1
    assert chosen(books, books.contract(training), seed=2).digest not in digests


@pytest.fixture
def young(books: Books) -> Books:
    """Half of all are bad, which is known after an hour; the others are known to be good after a day. Four days."""
    cases = []
    for n in range(960):
        at, bad = n / 10, n % 2 == 0
        after = 1.0 if bad else None
        cases.append({"id": f"p-{n:03d}", "at": at, "after": after, "label": "bad" if bad else "good"})
        if at + (after or 24.0) > 96:
            cases[-1]["label"] = None
    books.add(*cases)
    books.tick(96)
    books.seal(72, trainable=720)
    return books


def test_labels_that_came_early_are_left_out_or_taken_or_weighted(young: Books) -> None:
    shares = {}
    for cohort in ("mature", "observed", "ipw"):
        selection = chosen(young, young.contract(f"cohort: {cohort}, max_rows: 100000"))
        weights = weight_by_label(selection.learn)
        shares[cohort] = weights["bad"] / sum(weights.values())
        until = selection.until - START
        assert until == timedelta(hours=72) if cohort == "mature" else until > timedelta(hours=94)
        assert all(row.prediction_id < "p-720" for row in selection.calibrate)
    assert shares["mature"] == pytest.approx(0.5, abs=0.01)
    assert shares["observed"] > 0.57
    assert shares["ipw"] == pytest.approx(0.5, abs=0.01)


def test_a_sample_of_the_weighted_is_drawn_at_random(young: Books) -> None:
    selection = chosen(young, young.contract("cohort: ipw, max_rows: 300"))
    learned = sorted(ids(selection, "new"))
    assert len(learned) == 300 - len(selection.calibrate)
    assert learned[0] < "p-050"
    assert learned[-1] > "p-900"


@pytest.mark.parametrize(
    ("training", "problem"),
    [
        ("control: {weight: 0.5}", "name an input as `holdout` or as `exposure`"),
        ("control: {holdout: queue}", "'queue' is not an input of `type: boolean`"),
        ("control: {exposure: nothing}", "'nothing' is not an input of `type: boolean`"),
        ("control: {holdout: held_out, propensity: acted_on}", "'acted_on' is not an input of `type: number`"),
        ("control: {exposure: acted_on, propensity: chance}", "name `holdout` too"),
        ("control: {exposure: acted_on, weight: 2}", "0 to 1"),
        ("prefer: uncertain, cohort: ipw", "`uncertain` with `cohort: ipw`: its weights need a sample drawn at random"),
        ("prefer: rare, cohort: ipw", "`rare` with `cohort: ipw`: its weights need a sample drawn at random"),
        ("cohort: naive", "Invalid enum value"),
        ("balance: yes please", "Invalid enum value"),
    ],
)
def test_a_section_that_makes_no_sense_is_named(books: Books, training: str, problem: str) -> None:
    with pytest.raises(ContractError, match=problem.replace("(", r"\(")):
        books.contract(training)


def test_what_tells_of_the_models_own_decision_is_not_taught(books: Books) -> None:
    text = books.contract().training.template
    path = books.folder / "cases.yaml"
    path.write_text(
        path.read_text()
        .replace('"{text}"', '"{text} {held_out}"')
        .replace("window_rows: 10", "window_rows: 10, control: {holdout: held_out}")
    )
    assert text == "{text}"
    with pytest.raises(ContractError, match=r"training\.template: the model would learn from it"):
        load_contract(path)


def test_counts_are_of_the_rows_that_are_listed(books: Books) -> None:
    books.add(*simple(60, text="one of many"), *simple(60, 60))
    books.seal(12)
    selection = chosen(books, books.contract("replay: 1"))
    listed = Counter(row["part"] for row in selection.rows.to_pylist() if row["weight"] > 0)
    assert listed == {part: n for part, n in selection.counts.items() if part in ("new", "replay", "calibrate") and n}
    assert selection.new == listed["new"] + listed["calibrate"]


@pytest.mark.parametrize(
    ("stream", "inputs", "label", "outside"),
    [
        ("text-similarity", {"first": "a", "second": "b"}, "0.5", "1.5"),
        ("comment-emotions", {"text": "a"}, "joy,love", "joy,hunger"),
        ("argument-ranking", {"topic": "t", "first": "a", "second": "b"}, "second", "third"),
        ("restaurant-texts", {"name": "a"}, "Any text.", None),
        ("venue-replies", {"kind": "hotel", "act": "inform", "known": "a", "reply": "b"}, "up", "sideways"),
        ("venue-choices", {"kind": "hotel", "act": "x", "known": "a", "first": "b", "second": "c"}, "first", "third"),
    ],
)
def test_what_is_a_label_is_for_the_contract_to_say(
    stream: str, inputs: dict[str, str], label: str, outside: str | None
) -> None:
    contract = load_contract(Path(__file__).parents[2] / "schemas" / "contracts" / f"{stream}.yaml")
    row = {"prediction_id": "p", "revision": 1, "inputs": encode(inputs).decode(), "predicted_at": START}
    row |= {"delay_us": 0, "margin": 1.0, "excluded": None, "of_label": 0.0, "of_slice": 0}
    assert _read(contract, row | {"label": label}, None).excluded is None
    if outside is not None:
        assert _read(contract, row | {"label": outside}, None).excluded == "outside"


def test_the_same_rows_are_chosen_however_many_are_read_at_once(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    books.add(*simple(60))
    books.seal(3)
    books.seal(6)
    contract = books.contract("replay: 0.5, max_rows: 20, prefer: uncertain")
    whole = chosen(books, contract)
    monkeypatch.setattr(lake, "_BATCH_ROWS", 7)
    pieces = chosen(books, contract)
    assert (pieces.learn, pieces.calibrate, pieces.counts) == (whole.learn, whole.calibrate, whole.counts)
    assert pieces.digest == whole.digest


def test_of_a_large_window_the_same_rows_judge_every_time_and_the_label_has_no_part_in_it(books: Books) -> None:
    books.add(*simple(400))
    books.seal(40, trainable=400)
    books.add(*({**case, "label": "bad", "revision": 2} for case in simple(400)))
    books.seal(80, trainable=400)
    contract = books.contract()
    with open_lake(books.config) as newest:
        window = sealed_windows(newest, STREAM)[0]
        after = [row.prediction_id for row in rows_of(newest, contract, window, most=100)]
        all_of_it = [row.prediction_id for row in rows_of(newest, contract, window, most=400)]
    with open_lake(books.config, at_snapshot=window.snapshot_id) as then:
        before = [row.prediction_id for row in rows_of(then, contract, window, most=100)]
    assert before == after == sorted(before)
    assert 70 < len(before) < 130
    assert all_of_it == [f"p-{n:03d}" for n in range(400)]
