"""Calibration: each method undoes what it can undo, freedom must pay on rows held out, and few rows change nothing."""

import math
import subprocess
import sys
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual import scores
from accrual.calibrator import Calibrator, Sigmoid, Steps, uncurved
from accrual.generator import Generator
from trainer.calibrate import FEWEST_ROWS, calibrate, loss_per_row
from trainer.calibrate_text import calibrate_text

METHODS = ["temperature", "platt", "beta", "isotonic"]


def two_classes(rows: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `scale` times too sure and `shift` too high, and what was true."""
    chance = np.random.default_rng(seed)
    log_odds = chance.normal(-1.5, 1.5, rows)
    truth = (chance.random(rows) < 1 / (1 + np.exp(-log_odds))).astype(np.int64)
    return np.column_stack([np.zeros(rows), scale * log_odds + shift]).astype(np.float32), truth


def many_classes(rows: int, seed: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    honest = chance.normal(0, 2, (rows, 5))
    truth = np.array([chance.choice(5, p=p) for p in uncurved(honest, 1.0, each=False)])
    return (scale * honest).astype(np.float32), truth


def test_a_model_that_is_too_sure_is_cooled_by_how_much_it_is() -> None:
    fitted = calibrate(*many_classes(2000, 1, scale=3.0), method="temperature")
    assert fitted.temperature == pytest.approx(3.0, rel=0.1)
    logits, truth = many_classes(2000, 2, scale=3.0)
    assert scores.calibration_error(uncurved(logits, 1.0, each=False), truth) > 0.1
    assert scores.calibration_error(fitted.probabilities(logits), truth) < 0.03


@pytest.mark.parametrize("method", ["platt", "beta", "isotonic"])
def test_a_shift_which_no_temperature_can_undo_is_undone(method: str) -> None:
    train, later = two_classes(1500, 3, scale=1.5, shift=1.5), two_classes(3000, 4, scale=1.5, shift=1.5)
    cooled, curved = (calibrate(*train, method=which).probabilities(later[0]) for which in ("temperature", method))
    assert scores.calibration_error(cooled, later[1]) > 0.06
    assert scores.calibration_error(curved, later[1]) < 0.045


def test_beta_undoes_what_is_wrong_at_one_end_only() -> None:
    """p is the cube of the truth's probability: in logarithms a scale for ln p alone."""
    chance = np.random.default_rng(5)
    honest = chance.uniform(0.02, 0.98, 6000)
    truth = (chance.random(6000) < honest).astype(np.int64)
    said = honest**3
    logits = np.column_stack([np.log1p(-said), np.log(said)]).astype(np.float32)
    fitted = {method: calibrate(logits[:3000], truth[:3000], method) for method in ("platt", "beta")}
    losses = {m: scores.log_loss(c.probabilities(logits[3000:]), truth[3000:]) for m, c in fitted.items()}
    assert losses["beta"] < losses["platt"] - 0.002
    assert scores.calibration_error(fitted["beta"].probabilities(logits[3000:]), truth[3000:]) < 0.03


@given(st.sampled_from(METHODS), st.integers(2, 5), st.integers(0, 1000))
def test_whatever_the_rows_probabilities_sum_to_one_and_keep_the_order(method: str, classes: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    logits = chance.normal(0, 3, (30, classes)).astype(np.float32)
    truth = chance.integers(0, classes - 1, 30) if seed % 3 else np.zeros(30, dtype=np.int64)  # one class is missing
    fitted = calibrate(logits, truth, method)
    said = fitted.probabilities(logits)
    assert said.sum(axis=1) == pytest.approx(np.ones(30))
    assert ((said > 0) & (said < 1)).all()
    if classes == 2:
        order = np.argsort(uncurved(logits, 1.0, each=False)[:, 1])
        assert (np.diff(said[order, 1]) >= -1e-12).all()
    assert msgspec.json.decode(msgspec.json.encode(fitted), type=Calibrator) == fitted


@pytest.mark.parametrize("method", ["platt", "beta"])
def test_a_class_that_never_came_is_less_likely_and_not_impossible(method: str) -> None:
    logits, _ = two_classes(200, 14)
    said = calibrate(logits, np.zeros(200, dtype=np.int64), method).probabilities(logits)[:, 1]
    assert 1e-5 < said.mean() < 0.02


def test_freedom_is_taken_where_it_pays() -> None:
    assert calibrate(*two_classes(400, 6, scale=1.5, shift=1.5)).method == "platt"


def test_freedom_that_wins_by_chance_only_is_not_taken() -> None:
    """Logits that one temperature sets right: over many samples the others are rarely taken."""
    taken = [calibrate(*two_classes(150, seed, scale=2.0)).method for seed in range(40)]
    assert taken.count("temperature") >= 34


def test_isotonic_is_not_taken_on_the_few_rows_of_many_classes() -> None:
    """As on banking77, where it cost accuracy."""
    logits, truth = many_classes(120, 7, scale=2.0)
    chosen, isotonic = calibrate(logits, truth), calibrate(logits, truth, "isotonic")
    later, then = many_classes(4000, 8, scale=2.0)
    assert chosen.method == "temperature"
    losses = [scores.log_loss(c.probabilities(later), then) for c in (chosen, isotonic)]
    assert losses[0] < losses[1]


def test_a_method_that_gets_fewer_right_is_not_taken_whatever_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, truth = two_classes(400, 6, scale=1.5, shift=1.5)
    monkeypatch.setattr("trainer.calibrate.accuracy", lambda said, _: float(said[:, 1].mean()))  # Platt lowers these
    assert calibrate(logits, truth).method == "temperature"


def test_few_rows_move_the_champions_temperature_little_and_many_as_far_as_they_say() -> None:
    champion = Calibrator(method="platt", temperature=2.0, curves=[Sigmoid(1.0, 1.0, 0.0)], rows=300)
    fitted = [calibrate(*two_classes(n, 9, scale=6.0), champion=champion).temperature for n in (0, 5, 40, 1000)]
    assert fitted[0] == pytest.approx(2.0, abs=0.01)
    assert fitted == sorted(fitted)
    assert fitted[1] < 2.6
    assert fitted[3] == pytest.approx(6.0, rel=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_a_handful_of_rows_gives_no_curve_whatever_the_contract_says(method: str) -> None:
    for rows in (0, 1, FEWEST_ROWS - 1):
        fitted = calibrate(*two_classes(rows, 10, scale=1.5), method=method)
        assert (fitted.method, fitted.curves, fitted.rows) == ("temperature", [], rows)
    assert calibrate(*two_classes(FEWEST_ROWS, 10), method=method).method == method


def test_curves_are_chosen_only_where_each_class_has_rows() -> None:
    """The same rows and shift; but the one model has forty classes to tell apart."""
    chance = np.random.default_rng(15)
    logits, truth = two_classes(300, 6, scale=1.5, shift=1.5)
    assert calibrate(logits, truth).method == "platt"
    spread = np.column_stack([logits, chance.normal(-9, 0.1, (300, 38))]).astype(np.float32)
    assert calibrate(spread, truth).method == "temperature"


def test_a_generator_without_rows_to_calibrate_on_keeps_the_champions_temperature() -> None:
    champion = Calibrator(temperature=1.25, rows=40)
    assert calibrate_text(cast(Generator, None), [], "auto", champion, []) == champion


def test_without_calibration_logits_are_taken_as_they_are() -> None:
    logits, truth = two_classes(400, 10, scale=3.0)
    assert calibrate(logits, truth, method="none") == Calibrator(method="none")
    assert calibrate(logits, truth, method="none").probabilities(logits) == pytest.approx(
        uncurved(logits, 1.0, each=False)
    )


def test_labels_outside_the_classes_make_a_model_less_sure() -> None:
    """One in five rows is of a class that the model does not know; of the rows that follow too."""

    def with_others(seed: int) -> tuple[np.ndarray, np.ndarray]:
        logits, truth = many_classes(2000, seed, scale=1.0)
        return logits, np.where(np.arange(2000) % 5 == 0, scores.OUTSIDE, truth)

    logits, truth = with_others(11)
    known = truth != scores.OUTSIDE
    fitted, without = calibrate(logits, truth), calibrate(logits[known], truth[known])
    assert fitted.temperature > 1.2 > without.temperature
    later, then = with_others(13)
    said, said_without = fitted.probabilities(later), without.probabilities(later)
    assert scores.calibration_error(said, then) < scores.calibration_error(said_without, then) / 2
    assert scores.brier(said, then) < scores.brier(said_without, then)


@given(st.integers(0, 1000))
def test_of_two_classes_the_loss_is_their_log_loss(seed: int) -> None:
    logits, truth = two_classes(20, seed)
    said = uncurved(logits, 1.0, each=False)
    assert loss_per_row(said, truth) == pytest.approx(scores.log_loss_per_row(said, truth))


def test_a_bundles_calibrator_of_before_is_read_as_it_was_meant() -> None:
    old = msgspec.json.decode(b'{"temperature":1.7,"rows":120}', type=Calibrator)
    logits, _ = two_classes(5, 12)
    assert old.probabilities(logits) == pytest.approx(uncurved(logits, 1.7, each=False))


def test_the_curves_are_what_their_parameters_say() -> None:
    said = np.array([0.2, 0.5])
    assert Sigmoid(2.0, 0.5, 0.1)(said) == pytest.approx(
        [1 / (1 + math.exp(-(2 * math.log(p) - 0.5 * math.log(1 - p) + 0.1))) for p in said]
    )
    assert Steps([0.1, 0.3], [0.2, 0.6])(np.array([0.0, 0.1, 0.2, 0.9])) == pytest.approx([0.2, 0.2, 0.4, 0.6])


def test_services_apply_it_with_numpy_alone() -> None:
    program = "import sys, accrual.calibrator; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "sklearn", "scipy", "pyarrow"} & set(loaded.stdout.split()) == set()


@pytest.mark.parametrize("method", ["temperature", "platt", "beta", "isotonic"])
def test_a_rows_weight_is_as_many_rows_as_it_says(method: Any) -> None:
    logits, truth = two_classes(300, 15, scale=2.0)
    weights = np.where(logits.argmax(axis=1) == truth, 1, 4)
    weighted = calibrate(logits, truth, method=method, weights=weights.tolist())
    repeated = calibrate(np.repeat(logits, weights, axis=0), np.repeat(truth, weights), method=method)
    # The priors count as much against 300 rows as against 600, so the two are near, not the same.
    plain = calibrate(logits, truth, method=method)
    near, far = (np.abs(one.probabilities(logits) - repeated.probabilities(logits)).mean() for one in (weighted, plain))
    assert near < 0.02 < far / 2


def test_a_score_is_calibrated_by_what_it_should_have_been() -> None:
    chance = np.random.default_rng(2)
    logits = chance.normal(0, 3, (900, 1)).astype(np.float32)
    truth = np.clip(1 / (1 + np.exp(-logits / 3)) + chance.normal(0, 0.05, logits.shape), 0, 1)
    for method in ("temperature", "platt", "beta", "isotonic"):
        fitted = calibrate(logits[:600], truth[:600], method=method)
        said = fitted.probabilities(logits[600:])
        assert fitted.each and said.shape == (300, 1)
        assert np.abs(said - truth[600:]).mean() < 0.06
    assert (
        np.abs(calibrate(logits[:600], truth[:600], method="none").probabilities(logits[600:]) - truth[600:]).mean()
        > 0.15
    )
