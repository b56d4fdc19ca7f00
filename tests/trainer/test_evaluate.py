"""Evaluation: the ledger's figures are those of the rows, by slice too, and the gate's evidence is of the same rows."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from accrual import scores
from accrual.events import encode
from accrual.judged import judged
from accrual.ledger import decode_ledger_entry
from trainer import evaluate
from trainer.evaluate import MOST_SLICES, Scored, by_slice, calibration_error_of, gains_of, learned_from, losses_of
from trainer.select import Window

AT = datetime(2026, 1, 1, tzinfo=UTC)


def scored(model: str, window: int, rows: int = 90, seed: int = 1, slices: int = 3) -> Scored:
    rng = np.random.default_rng([seed, window])
    probabilities = rng.dirichlet([1, 1, 1], rows)
    truth = np.random.default_rng(window).integers(-1, 3, rows)
    names = [(f"grade={n % slices}", f"term={n % 2}") for n in range(rows)]
    place = Window("loans", window, 7, AT, AT, 0.9)
    return Scored(model, place, [f"{window}-{n}" for n in range(rows)], judged(probabilities, truth), names)


def test_an_entry_says_of_each_slice_what_its_rows_say_and_comes_back_from_the_wire() -> None:
    part = scored("loans@1", 2)
    entry = part.entry("run", "challenger", AT, {"grade=1": 0.04}, e_value=3.0, verdict="wait")
    assert [s.name for s in entry.slices] == ["grade=0", "grade=1", "grade=2", "term=0", "term=1"]
    one = entry.slices[1]
    inside = np.arange(90) % 3 == 1
    assert (one.rows, one.loss_at_most) == (30, 0.04)
    assert one.brier == pytest.approx(part.judged.brier[inside].mean())
    assert one.accuracy == part.judged.hits[inside].mean()
    assert entry.slices[0].loss_at_most is None
    assert decode_ledger_entry(encode(entry)) == entry


def test_a_field_of_many_values_makes_no_endless_entry() -> None:
    entry = scored("loans@1", 2, rows=1000, slices=1000).entry("run", "champion", AT)
    assert len(entry.slices) == MOST_SLICES
    assert {"term=0", "term=1"} <= {s.name for s in entry.slices}, "the largest"


def test_the_gates_evidence_is_of_the_same_rows_over_all_windows() -> None:
    ours, theirs = [scored("loans@2", n, seed=5) for n in (3, 4)], [scored("loans@1", n, seed=6) for n in (3, 4)]
    gains = gains_of(ours, theirs)
    assert [len(g) for g in gains] == [90, 90]
    assert gains[1] == pytest.approx(theirs[1].judged.brier - ours[1].judged.brier)
    slices = by_slice(ours, gains)
    assert slices["grade=2"] == pytest.approx(np.concatenate([g[2::3] for g in gains]))
    assert sum(len(slices[f"term={n}"]) for n in (0, 1)) == 180
    both = [np.concatenate([getattr(part.judged, name) for part in ours]) for name in ("said", "happened")]
    assert calibration_error_of(ours) == scores.calibration_error_of(*both)


def of_two(window: int, seed: int, labels: tuple[int, int] = (0, 2)) -> Scored:
    """Of two classes; a label is one of them, or -1 for none that the model knows."""
    p = np.random.default_rng(seed).uniform(0, 1, 90)
    truth = np.random.default_rng(window).integers(*labels, 90)
    place = Window("loans", window, 7, AT, AT, 0.9)
    return Scored("m", place, [], judged(np.column_stack([1 - p, p]), truth), [()] * 90)


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
    monkeypatch.setattr(evaluate, "lineage", lambda *_: {"4-80", "3-2", "9-1"})
    assert learned_from(Path(), "x", [scored("loans@2", 3), scored("loans@2", 4)]) == ["3-2", "4-80"]
    assert learned_from(Path(), "x", [scored("loans@2", 5)]) == []
