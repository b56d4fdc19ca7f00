"""What comes for a sealed window later marks it, and the generations that learned from it."""

from collections.abc import Callable
from datetime import timedelta

import pyarrow as pa

from accrual.lake import WritableLake
from accrual.lake_tables import TABLES
from consumers.audit import audit
from consumers.recall import touched_windows
from consumers.recompute import Scope
from consumers.windows import Sealer
from tests.consumers.conftest import STREAM, World

FullLake = Callable[[int], WritableLake]


def sealed(world: World, lake: WritableLake) -> int:
    sealer, count = Sealer(lake, world.contracts, world.names), 0
    while windows := sealer.seal(world.guard(lake)):
        count += len(windows)
    return count


def publish(lake: WritableLake, version: int, windows: list[int]) -> None:
    row = {"stream": STREAM, "version": version, "model": f"{STREAM}@{version}", "windows": windows, "offset": version}
    lake.append({"generations": pa.Table.from_pylist([row], TABLES["generations"])})


def test_a_later_revision_touches_its_window_and_the_models_made_from_it(world: World, full_lake: FullLake) -> None:
    lake = full_lake(200)
    assert sealed(world, lake) == 3
    publish(lake, 1, [1])
    publish(lake, 2, [1, 2])
    assert touched_windows(lake) == []
    [row] = lake.rows(
        "select prediction_id, revision, label from ground_truth g join windows w on w.window = 2"
        " and predicted_at >= from_time and predicted_at < to_time where status = 'labeled' and revision = 1 limit 1"
    )
    p = world.prediction(int(row["prediction_id"].removeprefix("p-")))
    same = world.outcome(p, timedelta(hours=8), row["label"])
    other = world.outcome(p, timedelta(hours=10), "high" if row["label"] == "low" else "low")
    for revision, outcome, changed in ((2, same, 0), (3, other, 1)):
        world.send(outcome)
        world.send(world.ground_truth(p, outcome, revision=revision))
        world.pour(lake)
        [window] = touched_windows(lake, STREAM)
        assert (window.window, window.predictions, window.labels_changed) == (2, 1, changed)
        assert window.generations == [f"{STREAM}@2"]
    assert audit(lake, world.contracts, world.names, Scope()).balanced  # what was sealed is still there
    assert touched_windows(lake, "another") == []


def test_an_altered_row_of_a_sealed_window_is_found(world: World, full_lake: FullLake) -> None:
    lake = full_lake(200)
    assert sealed(world, lake) == 3
    [row] = lake.rows('select min(prediction_id) as id from sealed_rows where "window" = 3')
    lake.rows("delete from ground_truth_history where prediction_id = ?", [row["id"]])
    found = audit(lake, world.contracts, world.names, Scope()).differences
    assert [d.id for d in found if d.kind == "window altered"] == ["window 3"]
