"""The delay curve is the Kaplan-Meier estimate, and windows seal by it where the contract says so."""

from collections import Counter
from datetime import timedelta
from math import isclose
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.config import Config
from accrual.contract import load_contracts
from accrual.lake import WritableLake
from accrual.watermark import watermark_of
from consumers.maturity import FEWEST_AT_RISK, STEPS, Curve, delay_curve, estimate, maturity
from consumers.windows import Sealer
from tests.consumers.conftest import START, STREAM, World

HORIZON_US = 24 * 3600 * 1_000_000
DAY = timedelta(days=1)


def product_limit(lives: list[tuple[int, bool]], step: int) -> float:
    """The estimator as its paper writes it: over the moments of events, (n - d) / n."""
    still_open = 1.0
    for moment in sorted({when for when, labeled in lives if labeled and when <= step}):
        at_risk = sum(when >= moment for when, _ in lives)
        events = sum(when == moment and labeled for when, labeled in lives)
        still_open *= (at_risk - events) / at_risk
    return 1 - still_open


LIVES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, STEPS - 1), st.booleans()),
        st.tuples(st.just(STEPS), st.just(False)),  # as old as the horizon, without label
    ),
    min_size=1,
    max_size=200,
)


@given(lives=LIVES)
def test_the_curve_is_the_product_limit_estimate(lives: list[tuple[int, bool]]) -> None:
    lives = lives + [(STEPS, False)] * FEWEST_AT_RISK + [(STEPS // 2, True)]
    counts = {step: (0, 0) for step, _ in lives}
    for (step, labeled), n in Counter(lives).items():
        labels, still_open = counts[step]
        counts[step] = (labels + n, still_open) if labeled else (labels, still_open + n)
    curve = estimate(HORIZON_US, counts)
    last = product_limit(lives, STEPS - 1)
    for step in {0, 17, STEPS // 2, STEPS - 1, *(when for when, _ in lives if when < STEPS)}:
        assert isclose(curve.shares[step], product_limit(lives, step) / last, abs_tol=1e-9)


def test_without_predictions_as_old_as_the_horizon_nothing_is_known() -> None:
    assert estimate(HORIZON_US, {10: (50, 0), 20: (0, 50)}).shares == []
    assert estimate(HORIZON_US, {10: (0, 0), STEPS: (0, 50)}).shares == []
    assert estimate(HORIZON_US, {10: (95, 0), 20: (0, 5)}).shares == []
    assert estimate(HORIZON_US, {10: (96, 0), 20: (0, 4)}).shares[10] == 1.0  # nearly all had theirs by then
    unknown = Curve(HORIZON_US, [])
    assert unknown.age_us(0.5) == HORIZON_US
    assert unknown.at(STEPS - 1) is None
    assert unknown.at(STEPS) == 1.0


def send(world: World, minute: int, hours: float | None) -> None:
    """A prediction labeled after so many hours, or not."""
    p = world.prediction(minute)
    world.send(p)
    if hours is not None:
        o = world.outcome(p, timedelta(hours=hours))
        world.send(o)
        world.send(world.ground_truth(p, o))


def test_open_predictions_count_as_long_as_they_were_watched(world: World, lake: WritableLake) -> None:
    """Early on only quick labels are there; the average of what arrived would call all of them quick."""
    for n in range(0, 2 * 1440, 10):
        now_h = 48 + 1  # the horizon is a day, so the second day is only partly over
        hours = 2.0 if n % 40 else 20.0
        send(world, n, hours if n / 60 + hours <= now_h else None)
    world.pour(lake)
    contract = world.contracts[STREAM]
    curve = delay_curve(lake, contract, START + timedelta(hours=49))
    by_five_hours = curve.at(5 * STEPS // 24)
    assert by_five_hours is not None
    assert isclose(by_five_hours, 0.75, abs_tol=0.02)
    assert curve.age_us(0.7) <= timedelta(hours=2.1) / timedelta(microseconds=1)
    assert curve.age_us(0.9) >= timedelta(hours=20) / timedelta(microseconds=1)
    young = maturity(lake, contract, START + timedelta(hours=49), START + 1.6 * DAY, START + 1.9 * DAY)
    assert young is not None
    assert isclose(young, 0.75, abs_tol=0.02)
    assert maturity(lake, contract, START + 5 * DAY, START, START + DAY) == 1.0
    assert maturity(lake, contract, START + DAY, START + 3 * DAY, None) is None


@pytest.fixture
def impatient(config: Config) -> World:
    """A world whose windows are sealed when 85% of the labels are there."""
    path = Path(config.contracts) / "tickets.yaml"
    path.write_text(path.read_text().replace("window_rows: 50", "window_rows: 50, maturity: 0.85"))
    return World(config)


def test_a_window_is_sealed_when_its_share_of_labels_has_come(impatient: World, lake: WritableLake) -> None:
    world, contract = impatient, impatient.contracts[STREAM]
    for n in range(0, 2880, 5):
        hours = 20.0 if n % 50 == 0 else 2.0  # one in ten comes late
        send(world, n, hours if n / 60 + hours <= 48 else None)
    world.pour(lake)
    sealer = Sealer(lake, world.contracts, world.names)
    sealed = 0
    while sealer.seal(world.guard(lake)):
        sealed += 1
    windows = lake.rows('from windows order by "window"')
    assert len(windows) == sealed
    assert all(w["maturity"] == 0.85 for w in windows)
    watermark = watermark_of(lake, contract)
    assert watermark is not None
    newest = watermark - windows[-1]["to_time"]
    assert timedelta(hours=2) <= newest < timedelta(hours=2 + 6)  # far younger than the horizon of a day


def test_what_is_pending_lowers_the_coverage(impatient: World, lake: WritableLake) -> None:
    world = impatient
    for n in range(0, 2880, 10):
        send(world, n, None if n == 2000 else 2.0)
    world.pour(lake)
    sealer = Sealer(lake, world.contracts, world.names)
    while sealer.seal(world.guard(lake)):
        pass
    windows = lake.rows('from windows order by "window"')
    with_open_one = [w for w in windows if w["labeled"] < w["rows"]]
    assert [(w["rows"], w["labeled"]) for w in with_open_one] == [(51, 50)]
    assert with_open_one[0]["coverage"] == pytest.approx(50 / 51)


def test_the_share_must_be_one(config: Config) -> None:
    path = Path(config.contracts) / "tickets.yaml"
    path.write_text(path.read_text().replace("window_rows: 50", "window_rows: 50, maturity: 0.3"))
    with pytest.raises(Exception, match=r"training.maturity: is a share of the labels to come: 0.5 to 1"):
        load_contracts(Path(config.contracts))
