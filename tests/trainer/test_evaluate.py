"""Evaluation: the ledger's figures are those of the rows, by slice too, and the gate's evidence is of the same rows.

However many rows of a window are read and scored at once.
"""

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from accrual import lake, scores
from accrual.events import encode
from accrual.judged import judged
from accrual.lake import open_lake
from accrual.ledger import decode_ledger_entry
from accrual.predictor import Predictor
from accrual.signing import load_or_make_signing_key
from accrual.training_policy import Slices
from tests.trainer.books import STREAM, Books
from trainer import evaluate
from trainer.evaluate import (
    MOST_SLICES,
    Scored,
    by_slice,
    calibration_error_of,
    gains_of,
    learned_from,
    losses_of,
    score,
)
from trainer.freeze import freeze_generation_0
from trainer.gate import Verdict
from trainer.select import Window, rows_of, sealed_windows
from trainer.weigh import Row

AT = datetime(2026, 1, 1, tzinfo=UTC)


def scored(model: str, window: int, rows: int = 90, seed: int = 1, slices: int = 3) -> Scored:
    rng = np.random.default_rng([seed, window])
    probabilities = rng.dirichlet([1, 1, 1], rows)
    truth = np.random.default_rng(window).integers(-1, 3, rows)
    names = [(f"grade={n % slices}", f"term={n % 2}") for n in range(rows)]
    combinations = list(dict.fromkeys(names))
    place = Window("loans", window, 7, AT, AT, 0.9)
    return Scored(
        model,
        place,
        pa.chunked_array([[f"{window}-{n}" for n in range(rows)]]),
        judged(probabilities, truth),
        combinations,
        np.array([combinations.index(one) for one in names], dtype=np.int32),
        np.ones(rows),
    )


def test_a_window_is_scored_the_same_however_many_rows_are_read_and_scored_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = Books(tmp_path)
    books.add(
        *(
            {"id": f"p-{n:02}", "at": (n * 7 % 40) // 2, "label": "good" if n % 3 else "bad"}
            | {"text": f"a {'very good' if n % 3 else 'really bad'} thing, {n} times", "inputs": {"queue": f"q{n % 4}"}}
            for n in range(40)
        )
    )
    books.seal(20, trainable=40)
    contract, config = books.contract(), books.config
    sliced = msgspec.structs.replace(contract.gate, slices=Slices(fields=["queue"]))
    contract = msgspec.structs.replace(contract, gate=sliced)
    key = load_or_make_signing_key(config.signing_key, config.public_key)
    digest = freeze_generation_0(config.model_store, key, contract, "minilm")
    predictor = Predictor.load(config.model_store / digest, config)

    def at_once(read: int, scored: int) -> Scored:
        monkeypatch.setattr(lake, "_BATCH_ROWS", read)
        monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", scored)
        with open_lake(config) as opened:
            window = sealed_windows(opened, STREAM)[0]
            return score(predictor, window, rows_of(opened, contract, window))

    assert not len(score(predictor, Window(STREAM, 9, 7, AT, AT, 0.9), []).ids)
    weighed = [Row(f"p-{n}", "a thing", "good", weight=weight) for n, weight in enumerate((20.0, 1.0, 0.5))]
    assert score(predictor, Window(STREAM, 9, 7, AT, AT, 0.9), weighed).counts.tolist() == [1.0, 0.05, 0.025]
    whole, pieces = at_once(1000, 1000), at_once(7, 9)
    oldest_first = sorted(range(40), key=lambda n: ((n * 7 % 40) // 2, n))
    assert pieces.ids.to_pylist() == whole.ids.to_pylist() == [f"p-{n:02}" for n in oldest_first]
    for name in ("brier", "log_loss", "hits", "said", "happened"):
        assert getattr(pieces.judged, name) == pytest.approx(getattr(whole.judged, name), abs=1e-5)
    assert np.ptp(whole.judged.brier) > 0.1, "or their order would not matter"
    assert pieces.rows_by_slice()["queue=q3"].tolist() == [i for i, n in enumerate(oldest_first) if n % 4 == 3]
    for made, wanted in zip(*(one.entry("r", "champion", AT).slices for one in (pieces, whole)), strict=True):
        assert (made.name, made.rows, made.accuracy) == (wanted.name, wanted.rows, wanted.accuracy)


def test_an_entry_says_of_each_slice_what_its_rows_say_and_comes_back_from_the_wire() -> None:
    part = scored("loans@1", 2)
    entry = part.entry("run", "challenger", AT, Verdict("wait", 3.0, "", {"grade=1": 0.04}))
    assert (entry.e_value, entry.verdict) == (3.0, "wait")
    assert [s.name for s in entry.slices] == ["grade=0", "grade=1", "grade=2", "term=0", "term=1"]
    one = entry.slices[1]
    inside = np.arange(90) % 3 == 1
    assert (one.rows, one.loss_at_most) == (30, 0.04)
    assert one.brier == pytest.approx(part.judged.brier[inside].mean())
    assert one.accuracy == part.judged.hits[inside].mean()
    assert entry.slices[0].loss_at_most is None
    assert decode_ledger_entry(encode(entry)) == entry


def test_a_field_of_many_values_makes_no_endless_entry() -> None:
    part = scored("loans@1", 2, rows=1000, slices=1000)
    entry = part.entry("run", "champion", AT)
    assert len(entry.slices) == MOST_SLICES
    assert len(by_slice([part], gains_of([part], [part]))) == 1002, "and the gate guards all"
    assert {"term=0", "term=1"} <= {s.name for s in entry.slices}, "the largest"


def test_the_gates_evidence_is_of_the_same_rows_over_all_windows() -> None:
    ours, theirs = [scored("loans@2", n, seed=5) for n in (3, 4)], [scored("loans@1", n, seed=6) for n in (3, 4)]
    truth = np.random.default_rng(3).integers(-1, 3, 90)
    assert ours[0].entry("r", "challenger", AT).outside == (truth == -1).sum() > 0
    gains = gains_of(ours, theirs)
    assert [len(g) for g in gains] == [90, 90]
    assert gains[1] == pytest.approx(theirs[1].judged.brier - ours[1].judged.brier)
    slices = by_slice(ours, gains)
    assert slices["grade=2"] == pytest.approx(np.concatenate([g[2::3] for g in gains]))
    assert sum(len(slices[f"term={n}"]) for n in (0, 1)) == 180
    for name, found in slices.items():
        belongs = [np.array([name in names for names in part.combinations])[part.combination] for part in ours]
        inside = [g[rows] for g, rows in zip(gains, belongs, strict=True)]
        assert found.tolist() == np.concatenate(inside).tolist(), "row by row, in order"
    both = [np.concatenate([getattr(part.judged, name) for part in ours]) for name in ("said", "happened")]
    assert calibration_error_of(ours) == scores.calibration_error_of(*both)


def of_two(window: int, seed: int, labels: tuple[int, int] = (0, 2)) -> Scored:
    """Of two classes; a label is one of them, or -1 for none that the model knows."""
    p = np.random.default_rng(seed).uniform(0, 1, 90)
    truth = np.random.default_rng(window).integers(*labels, 90)
    place = Window("loans", window, 7, AT, AT, 0.9)
    ids = pa.chunked_array([pa.array([], pa.string())])
    found = judged(np.column_stack([1 - p, p]), truth)
    return Scored("m", place, ids, found, [()], np.zeros(90, dtype=np.int32), np.ones(90))


def test_the_most_that_a_row_can_lose_is_what_it_loses_when_the_worst_comes_true() -> None:
    ours, theirs = of_two(3, seed=5), of_two(3, seed=6)
    p, q = ours.judged.said, theirs.judged.said
    worst = min((2 * (q - y) ** 2 - 2 * (p - y) ** 2).min() for y in (0, 1))
    assert losses_of([ours], [theirs]) == [pytest.approx(-worst)]
    assert losses_of([ours], [ours]) == [0.0]


@pytest.mark.parametrize("seed", range(20))
def test_no_row_loses_more_than_was_possible_whatever_its_label(seed: int) -> None:
    ours, theirs = of_two(seed, seed, (-1, 2)), of_two(seed, seed + 50, (-1, 2))
    [gains], [most] = gains_of([ours], [theirs]), losses_of([ours], [theirs])
    assert gains.min() >= -most - 1e-12


def test_of_more_than_two_classes_any_loss_is_thought_possible() -> None:
    assert losses_of([scored("loans@2", 3, seed=5)], [scored("loans@1", 3, seed=6)]) == [2.0]


def test_rows_that_taught_are_found_in_any_judged_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "ids_learned_from", lambda *_: {"4-80", "3-2", "9-1"})
    assert learned_from(Path(), "x", [scored("loans@2", 3), scored("loans@2", 4)]) == ["3-2", "4-80"]
    assert learned_from(Path(), "x", [scored("loans@2", 5)]) == []
