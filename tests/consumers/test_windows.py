"""Windows are sealed once, complete, mature and equal to the recomputed join; or not yet, with the reason."""

from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256
from itertools import pairwise

import pytest

from accrual.config import Config
from accrual.lake import WritableLake, open_lake
from accrual.watermark import watermark_of
from consumers.windows import Sealer, next_window
from tests.consumers.conftest import START, STREAM, World

FullLake = Callable[[int], WritableLake]


def label(world: World, minute: int, prediction_id: str | None = None) -> None:
    """A prediction that has its label three hours later."""
    p = world.prediction(minute, prediction_id=prediction_id)
    o = world.outcome(p)
    for event in (p, o, world.ground_truth(p, o)):
        world.send(event)


def seal_all(world: World, lake: WritableLake) -> int:
    sealer = Sealer(lake, world.contracts, world.names)
    count = 0
    while sealed := sealer.seal(world.guard(lake)):
        count += len(sealed)
    return count


def waits_for(world: World, lake: WritableLake) -> str:
    contract = world.contracts[STREAM]
    return next_window(lake, world.contracts, world.names, STREAM, watermark_of(lake, contract)).waits_for


def test_windows_follow_each_other_and_hold_the_rows_they_say(
    config: Config, world: World, full_lake: FullLake
) -> None:
    lake = full_lake(500)
    assert seal_all(world, lake) == 9  # 500 labels, expired ones among them; the last 50 lack the row after them
    windows = lake.rows('from windows order by "window"')
    assert [w["window"] for w in windows] == list(range(1, 10))
    assert all(w["labeled"] == w["rows"] == 50 and w["coverage"] == 1.0 for w in windows)
    for before, after in pairwise(windows):
        assert before["to_time"] == after["from_time"]
    # The ground truth changes afterwards; whoever pins the window's snapshot sees what was sealed.
    lake.rows("update ground_truth_history set label = 'high'")
    for window in windows:
        with open_lake(config, at_snapshot=window["snapshot_id"]) as pinned:
            rows = pinned.rows(
                "from ground_truth where predicted_at >= ? and predicted_at < ? order by prediction_id",
                [window["from_time"], window["to_time"]],
            )
        text = "\n".join(f"{row['prediction_id']}|{row['revision']}|{row['label']}" for row in rows)
        assert sha256(text.encode()).hexdigest() == window["digest"]


def test_a_restart_goes_on_after_the_last_window(world: World, full_lake: FullLake) -> None:
    lake = full_lake(200)
    first = Sealer(lake, world.contracts, world.names).seal(world.guard(lake))
    assert [w["window"] for w in first] == [1]
    assert seal_all(world, lake) == 2
    assert seal_all(world, lake) == 0
    assert [w["window"] for w in lake.rows('from windows order by "window"')] == [1, 2, 3]


def test_predictions_of_the_same_moment_are_in_one_window(world: World, lake: WritableLake) -> None:
    for n in range(300):  # three moments, as of the months in loan data
        label(world, n // 120 * 1440, f"q-{n}")
    world.let_time_pass()
    world.pour(lake)
    assert seal_all(world, lake) == 2
    assert [w["rows"] for w in lake.rows('from windows order by "window"')] == [120, 120]


def test_too_few_labels(world: World, full_lake: FullLake) -> None:
    lake = full_lake(30)
    assert seal_all(world, lake) == 0
    assert waits_for(world, lake) == "labels: 32 of more than 50"


def test_immature_predictions(world: World, lake: WritableLake) -> None:
    for n in range(100):
        label(world, n)
    world.pour(lake)
    assert seal_all(world, lake) == 0
    assert waits_for(world, lake).startswith("maturity: event time 2025-01-02 00:50")


def test_a_pending_prediction_holds_its_window_back(world: World, lake: WritableLake) -> None:
    world.minutes(0, 100)
    world.send(world.prediction(20, prediction_id="forgotten"))
    world.let_time_pass()
    world.pour(lake)
    sealer = Sealer(lake, world.contracts, world.names)
    assert sealer.seal(world.guard(lake)) == []
    assert waits_for(world, lake) == "1 pending predictions"


def test_a_difference_holds_its_window_back(world: World, full_lake: FullLake) -> None:
    lake = full_lake(100)
    lake.rows("update ground_truth_history set label = 'high' where prediction_id = 'p-000005' and label = 'low'")
    lake.rows("update ground_truth_history set label = 'low' where prediction_id = 'p-000006'")
    assert seal_all(world, lake) == 0
    assert "differences to the recomputation" in waits_for(world, lake)


def test_the_sealer_looks_again_when_what_was_missing_has_come(
    world: World, lake: WritableLake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumers.windows._PAUSE_S", 0.0)
    monkeypatch.setattr("consumers.windows._PAUSE_FACTOR", 0.0)
    looks: list[str] = []
    sealer = Sealer(lake, world.contracts, world.names)
    real = sealer._seal_next
    monkeypatch.setattr(sealer, "_seal_next", lambda stream, guard: (looks.append(stream), real(stream, guard))[1])

    def bring(first: int, count: int) -> list[int]:
        for n in range(first, first + count):
            label(world, n)
        sealer.look_at(world.pour(lake))
        return [window["window"] for window in sealer.seal(world.guard(lake))]

    assert bring(0, 40) == []
    assert sealer.seal(world.guard(lake)) == []
    assert len(looks) == 1  # nothing new, no second look
    assert bring(40, 2) == []
    assert len(looks) == 1  # still too few labels
    assert bring(42, 30) == []
    assert len(looks) == 2  # enough, but not mature
    assert bring(80, 1) == []
    assert len(looks) == 2  # event time has not come far enough
    assert bring(80 + 1440, 1) == [1]
    assert len(looks) == 3
    assert lake.rows("select to_time from windows") == [{"to_time": START + timedelta(minutes=50)}]
