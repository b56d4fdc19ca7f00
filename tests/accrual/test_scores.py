"""Scores: against their definitions, computed the slow way."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from accrual import scores
from accrual.judged import Judged, judged
from accrual.output import Output


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


def test_the_interval_of_auroc_is_as_wide_as_samples_scatter() -> None:
    """By the parts of rows, with ties; one row of a kind says nothing about how that kind scatters."""
    samples = [_honest(300, seed) for seed in range(400)]
    found = [(np.round(p[:, 1], 1), happened == 1) for p, happened in samples]
    widths = [high - low for low, high in (scores.interval_of_auroc(*one) or (0, 0) for one in found)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std([scores.auroc(*one) for one in found]), rel=0.1)
    assert scores.interval_of_auroc(np.array([0.1, 0.2, 0.9]), np.array([False, False, True])) is None
    assert scores.interval_of_auroc(np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])) == (1.0, 1.0)


def test_calibration_of_two_classes_is_of_the_second() -> None:
    p = np.array([[0.8, 0.2]] * 10)
    assert scores.ece(p, np.array([1] * 2 + [0] * 8)) == pytest.approx(0.0)
    assert scores.ece(p, np.array([1] * 10)) == pytest.approx(0.8)


def test_labels_outside_the_classes() -> None:
    assert scores.indices_of(["b", "new", "a"], ["a", "b"]).tolist() == [1, scores.OUTSIDE, 0]


def _honest(rows: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes; what is said of the second is `shift` above the truth."""
    chance = np.random.default_rng(seed)
    true = chance.uniform(0.05, 0.7, rows)
    happened = (chance.random(rows) < true).astype(np.int64)
    return np.column_stack([1 - true - shift, true + shift]), happened


def test_of_what_chance_adds_to_the_ece_most_is_taken_off() -> None:
    plain = [scores.ece(*_honest(150, seed)) for seed in range(100)]
    debiased = [scores.calibration_error(*_honest(150, seed)) for seed in range(100)]
    assert np.mean(plain) > 0.08
    assert np.mean(debiased) < 0.04


def test_an_error_that_is_there_is_found_whole() -> None:
    found = [scores.calibration_error(*_honest(1000, seed, shift=0.1)) for seed in range(30)]
    assert 0.08 < np.mean(found) < 0.1
    assert scores.calibration_error(*_honest(30_000, 1, shift=0.1)) == pytest.approx(0.1, abs=0.006)


def test_rare_events_are_told_apart_among_small_probabilities() -> None:
    """All of them in one bin of equal width, where too much and too little would make up for each other."""
    chance = np.random.default_rng(3)
    said = np.repeat([0.01, 0.05], 5000)
    happened = (chance.random(10_000) < 0.03).astype(np.int64)
    assert scores.ece(np.column_stack([1 - said, said]), happened) < 0.01
    assert scores.calibration_error(np.column_stack([1 - said, said]), happened) == pytest.approx(0.02, abs=0.005)


def test_a_model_that_says_the_same_of_all_is_judged_by_the_rate_alone() -> None:
    p = np.array([[0.7, 0.3]] * 400)
    late = np.array([0] * 280 + [1] * 120)
    assert scores.calibration_error(p, late) == 0.0, "in whatever order the rows come"
    assert scores.calibration_error(p, 1 - late) == pytest.approx(0.4, abs=0.01)


@given(predictions())
def test_the_reliability_curve_holds_every_row_once_and_gives_the_ece(case: tuple[np.ndarray, np.ndarray]) -> None:
    p, truth = case
    curve = judged(p, truth).reliability
    assert sum(b.rows for b in curve) == len(truth)
    assert sum(b.rows * abs(b.said - b.happened) for b in curve) / len(truth) == pytest.approx(scores.ece(p, truth))
    assert scores.calibration_error(p, truth) >= 0
    for name, (low, high) in judged(p, truth).intervals.items():
        assert low <= high, name


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of what a great many rows would show; 95%, less what chance and the bootstrap of a bent figure take."""
    much = _honest(300_000, 1, shift=0.06)
    truth = {
        "accuracy": scores.accuracy(*much),
        "brier": scores.brier(*much),
        "log_loss": scores.log_loss(*much),
        "ece": scores.ece(*much),
        "auroc": scores.auroc(much[0][:, 1], much[1] == 1),
    }
    samples = [judged(*_honest(400, seed, shift=0.06)).intervals for seed in range(2, 152)]
    for name, least in {"accuracy": 0.9, "brier": 0.9, "log_loss": 0.9, "auroc": 0.9, "ece": 0.85}.items():
        inside = np.mean([low <= truth[name] <= high for low, high in (sample[name] for sample in samples)])
        assert least <= inside <= 0.995, name


def test_the_interval_of_the_ece_knows_that_the_questions_of_a_row_go_together() -> None:
    """Each row's twelve classes are there together or none is: that is as much as one question a row says."""

    def rows(count: int, seed: int, questions: int) -> Judged:
        rng = np.random.default_rng(seed)
        said = rng.uniform(0.1, 0.6, count)
        happened = (rng.random(count) < said + 0.06).astype(np.float64)
        return judged(np.tile(said[:, None], questions), np.tile(happened[:, None], questions))

    truth = rows(300_000, 1, 1).ece
    for questions in (1, 12):
        intervals = [rows(300, seed, questions).intervals["ece"] for seed in range(2, 102)]
        assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.8, questions


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_a_class_by_itself_is_scored_as_the_second_of_two(rows: list[tuple[float, bool]]) -> None:
    said, happened = np.array([[p] for p, _ in rows]), np.array([[float(y)] for _, y in rows])
    two, index = np.column_stack([1 - said, said]), happened[:, 0].astype(np.int64)
    for figure in (scores.brier, scores.log_loss, scores.ece, scores.calibration_error):
        assert figure(said, happened) == pytest.approx(figure(two, index), abs=1e-9)
    alone, second = judged(said, happened), judged(two, index)
    assert (alone.reliability, alone.auroc) == (second.reliability, second.auroc)


@given(st.lists(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=20))
def test_several_labels_are_as_many_questions(rows: list[list[tuple[float, bool]]]) -> None:
    said = np.array([[p for p, _ in row] for row in rows])
    truth = np.array([[float(y) for _, y in row] for row in rows])
    for of_row in (scores.brier_per_row, scores.log_loss_per_row):
        of_each = [of_row(said[:, [k]], truth[:, [k]]) for k in range(3)]
        assert of_row(said, truth) == pytest.approx(np.mean(of_each, axis=0))
    assert scores.brier_per_row(said, truth).min() >= 0 and scores.brier_per_row(said, truth).max() <= 2
    assert scores.ece(said, truth) == pytest.approx(scores.ece(said.reshape(-1, 1), truth.reshape(-1, 1)))


def test_truth_of_labels() -> None:
    several = Output(task="multilabel", classes=["joy", "love"])
    assert scores.truth_of(several, ["love,joy", "", "love", "grief"], several.classes).tolist() == [
        [1, 1],
        [0, 0],
        [0, 1],
        [0, 0],
    ]
    assert scores.truth_of(Output(task="score"), ["0.25", "1"], ["score"]).tolist() == [[0.25], [1.0]]
    assert scores.truth_of(Output(task="ranking"), ["second", "first"], ["first", "second"]).tolist() == [1, 0]
    assert scores.truth_of(several, [], several.classes).shape == (0, 2)


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.2, 0.9]), st.integers(0, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_scipys(rows: list[tuple[float, int]]) -> None:
    said, was = np.array([a for a, _ in rows]), np.array([float(b) for _, b in rows])
    if len(set(said)) == 1 or len(set(was)) == 1:
        assert scores.rank_correlation(said, was) is None
    else:
        assert scores.rank_correlation(said, was) == pytest.approx(spearmanr(said, was).statistic)
