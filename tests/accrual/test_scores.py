"""Scores: against their definitions, computed the slow way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual import scores


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rows, classes = draw(st.integers(1, 30)), draw(st.integers(2, 5))
    weights = np.array(
        draw(st.lists(st.lists(st.floats(0.01, 1), min_size=classes, max_size=classes), min_size=rows, max_size=rows))
    )
    truth = np.array(draw(st.lists(st.integers(-1, classes - 1), min_size=rows, max_size=rows)))
    return weights / weights.sum(axis=1, keepdims=True), truth


@given(predictions())
def test_brier_accuracy_and_log_loss_are_their_definitions(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, truth = case
    brier, hits, losses = [], [], []
    for row, label in zip(p, truth, strict=True):
        one_hot = [float(k == label) for k in range(len(row))]
        outside = 1.0 if label == scores.OUTSIDE else 0.0
        brier.append(sum((a - b) ** 2 for a, b in zip(row, one_hot, strict=True)) + outside)
        hits.append(int(np.argmax(row)) == label)
        losses.append(-np.log(max(row[label] if label >= 0 else 0.0, scores.SMALLEST)))
    assert scores.brier_per_row(p, truth) == pytest.approx(brier)
    assert scores.accuracy(p, truth) == pytest.approx(np.mean(hits))
    assert scores.log_loss(p, truth) == pytest.approx(np.mean(losses))
    assert 0 <= scores.ece(p, truth) <= 1


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[float, bool]]) -> None:
    said, happened = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    pairs = [(a, b) for a in said[happened] for b in said[~happened]]
    wanted = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs) if pairs else None
    assert scores.auroc(said, happened) == (None if wanted is None else pytest.approx(wanted))


def test_calibration_of_two_classes_is_of_the_second() -> None:
    p = np.array([[0.8, 0.2]] * 10)
    assert scores.ece(p, np.array([1] * 2 + [0] * 8)) == pytest.approx(0.0)
    assert scores.ece(p, np.array([1] * 10)) == pytest.approx(0.8)


def test_labels_outside_the_classes() -> None:
    assert scores.indices_of(["b", "new", "a"], ["a", "b"]).tolist() == [1, scores.OUTSIDE, 0]
