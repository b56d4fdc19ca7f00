"""The gate: its evidence is what it says, chance does not get past it, and a real gain does."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.training_policy import Gate, Slices
from trainer.gate import LARGEST_LOSS, STAKES, Verdict, judge, loss_at_most, spent_alpha, stake_of, wealth

NEVER = 10**9
GATE = Gate(alpha=0.05, patience=3, max_ece_increase=0.05)
gains = st.lists(st.floats(-2, 2), max_size=60).map(np.array)


@given(gains, gains)
def test_evidence_never_negative_and_does_not_depend_on_when_one_looks(first: np.ndarray, second: np.ndarray) -> None:
    both = np.concatenate([first, second])
    assert wealth(both) >= 0
    looked = judge([first, second], 1, 0.0, GATE).e_value if len(both) else 1.0
    assert looked == pytest.approx(wealth(both))


@given(st.floats(0.01, 2))
def test_a_fair_bet_is_fair(size: float) -> None:
    """Gain and loss of one size, equally likely: the mean of what a stake becomes is what it was."""
    assert (wealth(np.array([size])) + wealth(np.array([-size]))) / 2 == pytest.approx(1.0)


def test_what_is_no_difference_of_brier_scores_is_refused() -> None:
    for wrong in (2.1, -2.1, math.nan):
        with pytest.raises(ValueError, match=r"\[-2, 2\]"):
            wealth(np.array([0.0, wrong]))


def test_a_row_that_loses_more_than_was_said_is_refused() -> None:
    assert wealth(np.array([0.1, -0.3]), losses=0.3) > 0
    with pytest.raises(ValueError, match="loses no more than is said"):
        wealth(np.array([0.1, -0.3]), losses=0.29)


@given(st.floats(0, 2), st.sampled_from(STAKES))
def test_no_row_takes_more_than_there_is(most: float, share: float) -> None:
    stake = stake_of(share, most)
    assert 0 < stake <= share
    assert stake * most <= 0.97


def test_no_evidence_without_rows_or_without_difference() -> None:
    assert wealth(np.array([])) == 1.0
    assert wealth(np.zeros(1000)) == pytest.approx(1.0)


def test_alpha_is_spent_once_over_all_challengers() -> None:
    assert sum(spent_alpha(0.05, nth) for nth in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_chance_is_published_at_most_as_often_as_alpha_says() -> None:
    """A/A: challenger and champion equally good; looked at after every hundred rows, for ever after."""
    rng = np.random.default_rng(5)
    runs, published = 1000, 0
    gate = Gate(alpha=0.2, patience=100)
    for _ in range(runs):
        windows = np.split(rng.choice([-0.4, -0.1, 0.1, 0.4], size=1000), 10)
        nth_alpha = 1 / spent_alpha(gate.alpha, 1)
        evidence = [wealth(np.concatenate(windows[: n + 1])) for n in range(len(windows))]
        published += max(evidence) >= nth_alpha
    allowed = spent_alpha(gate.alpha, 1)
    assert published / runs <= allowed + 3 * math.sqrt(allowed / runs)


def test_a_real_gain_is_promoted_and_a_loss_rejected() -> None:
    rng = np.random.default_rng(7)
    better = rng.normal(0.15, 0.4, 600).clip(-2, 2)
    assert judge([better], 1, 0.0, GATE).verdict == "promote"
    assert judge([-better], 1, 0.0, GATE).verdict == "reject"


def test_a_small_gain_waits_for_more_rows_until_patience_ends() -> None:
    rng = np.random.default_rng(9)
    windows = [rng.normal(0.002, 0.3, 300) for _ in range(3)]
    assert judge(windows[:1], 1, 0.0, GATE).verdict == "wait"
    assert judge(windows[:2], 1, 0.0, GATE).verdict == "wait"
    last = judge(windows, 1, 0.0, GATE)
    assert last.verdict == "reject"
    assert "patience" in last.reason


def test_better_but_worse_calibrated_is_not_published() -> None:
    better = np.full(600, 0.2)
    assert judge([better], 1, 0.049, GATE).verdict == "promote"
    refused = judge([better], 1, 0.051, GATE)
    assert refused.verdict == "reject"
    assert "calibration" in refused.reason


def test_rows_that_do_not_count_are_no_evidence() -> None:
    """What a model's own decisions shaped speaks for it, and is not believed as much as the control arm."""
    rng = np.random.default_rng(3)
    gains, shaped = rng.normal(0.1, 0.2, 900).clip(-2, 2), np.arange(900) % 3 > 0
    gains[shaped] -= 0.2
    for counts in (np.where(shaped, 0.0, 1.0), np.where(shaped, 0.1, 1.0)):
        verdict = judge([gains], 1, 0.0, GATE, counts=[counts])
        assert verdict.verdict == "promote"
        assert f"lower by {np.average(gains, weights=counts):+.4f} a row over 900 rows" in verdict.reason
    assert verdict.e_value < judge([gains], 1, 0.0, GATE, counts=[np.where(shaped, 0.0, 1.0)]).e_value
    alone = judge([gains[~shaped]], 1, 0.0, GATE).e_value
    assert judge([gains], 1, 0.0, GATE, counts=[np.where(shaped, 0.0, 1.0)]).e_value == pytest.approx(alone)
    assert judge([gains], 1, 0.0, GATE).verdict == "reject"


def test_later_challengers_need_more_evidence() -> None:
    rows = np.full(60, 0.2)
    assert judge([rows], 1, 0.0, GATE).verdict == "promote"
    assert judge([rows], 40, 0.0, GATE).verdict == "wait"


def _life(rng: np.random.Generator, gate: Gate, mean: float = 0.0) -> list[Verdict]:
    """The verdicts on thirty challengers in a row, each looked at after every window of a hundred rows."""
    verdicts = []
    for nth in range(1, 31):
        rows = rng.choice([-0.5, -0.1, 0.1, 0.5], size=(3, 100)) + mean
        for seen in range(1, 4):
            verdict = judge(list(rows[:seen]), nth, 0.0, gate)
            if verdict.verdict != "wait":
                break
        verdicts.append(verdict)
    return verdicts


def test_over_a_streams_whole_life_chance_publishes_at_most_as_often_as_alpha_says() -> None:
    """A/A, peeking at every window: thirty challengers that are no better, and not one of them may come through."""
    rng, lives, gate = np.random.default_rng(17), 120, Gate(alpha=0.2, patience=3)
    published = sum(any(v.verdict == "promote" for v in _life(rng, gate)) for _ in range(lives))
    assert published / lives <= gate.alpha + 2 * math.sqrt(gate.alpha / lives)
    assert all(v.verdict == "reject" for v in _life(rng, gate)), "undecided ones are given up"


def _rows_until(evidence: float, gains: np.ndarray, most: float = LARGEST_LOSS) -> float:
    """How many rows until a first challenger's wealth reaches it, where none can lose more than `most`."""
    wealths = np.mean([np.exp(np.cumsum(np.log1p(stake_of(share, most) * gains))) for share in STAKES], axis=0)
    assert wealths[-1] == pytest.approx(wealth(gains, losses=most))
    reached = np.flatnonzero(wealths >= evidence)
    return reached[0] + 1 if len(reached) else NEVER


@pytest.mark.parametrize(
    ("mean", "spread", "least", "most"),
    [
        (0.136, 0.4, 40, 242),  # questions: the intents have drifted
        (0.0015, 0.05, 3_000, 40_000),  # loans
        (0.0005, 0.05, 10_000, NEVER),
    ],
)
def test_how_many_rows_a_gain_needs(mean: float, spread: float, least: float, most: float) -> None:
    """Nine of ten lie between: neither does it get by on fewer, nor does it waste what the rows say."""
    rng, needed = np.random.default_rng(3), 1 / spent_alpha(0.05, 1)
    many = 1_000 if mean > 0.1 else 50_000
    rows = [_rows_until(needed, rng.normal(mean, spread, many).clip(-2, 2)) for _ in range(40)]
    assert least <= np.quantile(rows, 0.05)
    assert np.quantile(rows, 0.95) <= most


Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # [rows]: said by the challenger, by the champion, and what happened


def _judged(drawn: Drawn) -> tuple[np.ndarray, float]:
    """The gains of a window, and the most that one of its rows can lose."""
    ours, theirs, happened = drawn
    possible = [2 * (theirs - y) ** 2 - 2 * (ours - y) ** 2 for y in (0, 1)]
    return np.where(happened == 1, possible[1], possible[0]), float(-np.minimum(*possible).min())


def _as_good(rng: np.random.Generator, rows: int) -> Drawn:
    """A rare event: both are wrong by as much, the one above and the other below."""
    risk = rng.uniform(0.03, 0.15, rows)
    wrong = rng.choice([-0.03, 0.03], rows)
    return risk + wrong, risk - wrong, rng.random(rows) < risk


def _better_here_and_worse_there(rng: np.random.Generator, rows: int) -> Drawn:
    """Better in many rows where both say nearly the same, as much worse in all in the few where they don't."""
    risk, far = np.full(rows, 0.05), np.arange(rows) % 10 == 0
    theirs = np.where(far, risk, risk + 0.05)
    ours = np.where(far, risk + 0.15, risk)
    return ours, theirs, rng.random(rows) < risk


@pytest.mark.parametrize("draw", [_as_good, _better_here_and_worse_there])
def test_stakes_by_what_was_said_publish_chance_no_more_often_than_alpha_says(
    draw: Callable[[np.random.Generator, int], Drawn],
) -> None:
    """A/A on rare events, looked at after each of twenty windows of 100 rows; stakes go up to 1.92."""
    rng, lives, gate = np.random.default_rng(23), 400, Gate(alpha=0.3, patience=100)
    published = 0
    for _ in range(lives):
        windows = [_judged(draw(rng, 100)) for _ in range(20)]
        gains, losses = [gain for gain, _ in windows], [loss for _, loss in windows]
        looks = (judge(gains[:seen], 1, 0.0, gate, losses=losses[:seen]).verdict for seen in range(1, 21))
        published += "promote" in looks
    allowed = spent_alpha(gate.alpha, 1)
    assert published / lives <= allowed + 2 * math.sqrt(allowed * (1 - allowed) / lives)


def test_on_rare_events_what_was_said_saves_a_third_of_the_rows_and_more() -> None:
    """The challenger knows the risk of each row, the champion its mean."""
    rng, needed = np.random.default_rng(29), 1 / spent_alpha(0.05, 1)
    with_stakes, without = [], []
    for _ in range(40):
        risk = np.clip(0.06 * np.exp(rng.normal(-0.18, 0.6, 12_000)), 0.01, 0.3)
        gains, most = _judged((risk, np.full(12_000, 0.06), rng.random(12_000) < risk))
        with_stakes.append(_rows_until(needed, gains, most))
        without.append(_rows_until(needed, gains))
    assert np.median(with_stakes) < np.median(without) * 2 / 3


def test_a_gain_like_that_of_loans_goes_on_over_the_windows_and_is_given_up_at_patience() -> None:
    rng = np.random.default_rng(4)
    windows = [rng.normal(0.001, 0.05, 1000) for _ in range(4)]
    gate = Gate(alpha=0.05, patience=4)
    verdicts = [judge(windows[:seen], 1, 0.0, gate) for seen in range(1, 5)]
    assert [v.verdict for v in verdicts] == ["wait", "wait", "wait", "reject"]
    assert "patience" in verdicts[-1].reason


GUARDED = Gate(alpha=0.05, patience=3, slices=Slices(fields=["grade"], most_loss=0.05, least_rows=300))
BETTER = np.full(900, 0.2)


def test_better_on_the_whole_and_much_worse_for_some_is_rejected() -> None:
    slices = {"grade=A": np.full(800, 0.25), "grade=B": np.full(100, -0.2)}
    whole = np.concatenate(list(slices.values()))
    assert judge([whole], 1, 0.0, Gate()).verdict == "promote"
    verdict = judge([whole], 1, 0.0, GUARDED, slices)
    assert verdict.verdict == "reject"
    assert "grade=B" in verdict.reason
    assert "grade=A" not in verdict.reason


def test_a_slice_must_prove_that_it_is_not_worse_and_has_until_patience() -> None:
    rng = np.random.default_rng(6)
    unsure = {"grade=A": BETTER, "grade=B": rng.normal(0.0, 0.4, 300)}
    first = judge([BETTER], 1, 0.0, GUARDED, unsure)
    assert first.verdict == "wait"
    assert "may still be worse" in first.reason
    assert "grade=B" in first.reason
    assert first.loss_at_most["grade=A"] == 0.0
    assert first.loss_at_most["grade=B"] > 0.05
    assert judge([BETTER] * 3, 1, 0.0, GUARDED, unsure).verdict == "reject"
    sure = unsure | {"grade=B": rng.normal(0.0, 0.05, 600)}
    assert judge([BETTER], 1, 0.0, GUARDED, sure).verdict == "promote"


def test_a_slice_with_too_few_rows_is_said_and_holds_nothing_up() -> None:
    few = {"grade=A": BETTER, "grade=G": np.zeros(299)}
    verdict = judge([BETTER], 1, 0.0, GUARDED, few)
    assert verdict.verdict == "promote"
    assert "too few rows to be sure of grade=G" in verdict.reason
    assert list(verdict.loss_at_most) == ["grade=A"]


def test_more_slices_ask_for_more_of_each() -> None:
    even = np.random.default_rng(8).normal(0.0, 0.1, 400)
    bounds = [
        judge([BETTER], 1, 0.0, GUARDED, {f"grade={n}": even for n in range(many)}).loss_at_most["grade=0"]
        for many in (1, 10)
    ]
    assert bounds[0] < bounds[1]


@pytest.mark.parametrize("loss", [0.0, 0.04, 0.2])
def test_the_bound_on_a_loss_is_never_below_it_more_often_than_said_however_often_one_looks(loss: float) -> None:
    rng, lives, alpha = np.random.default_rng(9), 100, 0.3
    below = 0
    for _ in range(lives):
        rows = rng.choice([-0.5, 0.5], size=300) - loss
        below += any(loss_at_most(rows[:seen], alpha) < loss for seen in range(20, 301, 40))
    assert below / lives <= alpha + 2 * math.sqrt(alpha / lives)


@given(gains, st.floats(0.01, 0.5))
def test_the_bound_on_a_loss_is_where_the_bet_refutes_it(rows: np.ndarray, alpha: float) -> None:
    bound = loss_at_most(rows, alpha)
    assert 0 <= bound <= 2
    if 0 < bound < 2:
        assert wealth(rows, bound) >= 1 / alpha > wealth(rows, bound - 2e-4)


@given(gains, st.floats(-1.9, 2))
def test_the_wealth_is_never_negative_and_rises_with_the_margin(rows: np.ndarray, margin: float) -> None:
    assert 0 <= wealth(rows, margin) <= wealth(rows, margin + 0.1) * (1 + 1e-9)
