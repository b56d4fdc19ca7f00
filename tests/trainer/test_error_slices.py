"""Error slices: a slice that broke is found beside those that did not, and chance is not taken for a change."""

import numpy as np
import pytest

from trainer.error_slices import LEAST_ROWS, clusters, slice_changes


def test_what_a_cycle_fixed_and_broke_is_told_apart_from_what_stayed() -> None:
    rng = np.random.default_rng(3)
    grades = np.repeat(["A", "B", "C"], 200)
    before = rng.uniform(0.2, 0.6, 600)
    after = before + rng.normal(0, 0.05, 600)
    after[grades == "A"] -= 0.15
    after[grades == "B"] += 0.15
    found = {change.name: change for change in slice_changes({"grade": list(grades)}, before, after)}
    assert {name: change.verdict for name, change in found.items()} == {"A": "fixed", "B": "broken", "C": "undecided"}
    assert found["B"].gain == pytest.approx(-0.15, abs=0.02)
    assert found["B"].low < found["B"].gain < found["B"].high
    assert next(iter(found)) == "B", "the worst slice comes first"


def test_among_many_slices_without_a_change_hardly_one_is_said_to_have_changed() -> None:
    rng = np.random.default_rng(11)
    said = 0
    for _ in range(50):
        names = [str(n) for n in rng.integers(0, 40, 4000)]
        changes = slice_changes({"field": names}, rng.normal(0.3, 0.2, 4000), rng.normal(0.3, 0.2, 4000))
        said += any(change.verdict != "undecided" for change in changes)
    assert said <= 8, "family-wise 5% of 50 looks is 2.5"


@pytest.mark.parametrize(("rows", "slices"), [(1_000, 14), (1_000, 30), (5_000, 30)])
def test_of_rare_events_chance_is_not_taken_for_a_change_either(rows: int, slices: int) -> None:
    """Where none of a slice's few rows had the event all gains are alike, and say nothing of what one event takes."""
    rng = np.random.default_rng(rows + slices)
    p, q = 0.045, 0.055  # as good as each other where it happens to one row in twenty
    most = 2 * (q - p) * (2 - p - q)
    said = 0
    for _ in range(40):
        names = [str(n) for n in rng.integers(0, slices, rows)]
        happened = rng.random(rows) < 0.05
        changes = slice_changes({"field": names}, 2 * (p - happened) ** 2, 2 * (q - happened) ** 2, most)
        said += any(change.verdict != "undecided" for change in changes)
    assert said <= 6, "family-wise 5% of 40 looks is 2"


def test_slices_of_a_few_rows_and_rows_in_no_slice_are_left_out() -> None:
    names = [*["few"] * (LEAST_ROWS - 1), *["many"] * LEAST_ROWS, *[None] * 50]
    flat = np.linspace(0, 1, len(names))
    assert [change.name for change in slice_changes({"field": names}, flat, flat)] == ["many"]


def test_texts_of_like_meaning_come_together_and_are_named_by_their_words() -> None:
    texts = ["the card was stolen"] * 30 + ["exchange rate today"] * 30
    rng = np.random.default_rng(5)
    centres = np.eye(8)[[0] * 30 + [3] * 30] + rng.normal(0, 0.05, (60, 8))
    vectors = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    named = clusters(vectors, texts, 2, seed=1)
    assert len(set(named[:30])) == len(set(named[30:])) == 1
    assert "stolen" in named[0] and "exchange" in named[-1]
    assert clusters(vectors, texts, 2, seed=1) == named
    assert clusters(vectors[:1], texts[:1], 5, seed=1) == ["1: card stolen the was"]
    assert clusters(vectors[:0], [], 5, seed=1) == []
