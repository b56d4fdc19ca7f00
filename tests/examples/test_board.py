"""The board knows when nothing is left for the trainer to judge a challenger on: only then the demo ends by itself."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from accrual.config import load_config
from accrual.lake import open_lake_for_writing
from accrual.lake_tables import TABLES
from examples.board import sealed_of

START = datetime(2026, 3, 1, tzinfo=UTC)
STREAM = "loans"


def window(number: int, at: float) -> dict[str, Any]:
    """Ten rows to learn from, sealed at this minute."""
    return {"stream": STREAM, "window": number, "trainable": 10, "sealed_at": START + timedelta(minutes=at)}


def run(version: int, windows: list[int], *states: tuple[str, float]) -> list[dict[str, Any]]:
    """What was said of a run: each state and the minute."""
    return [
        {
            "stream": STREAM,
            "run_id": f"r{version}",
            "version": version,
            "windows": windows,
            "state": state,
            "at": START + timedelta(minutes=at),
            "offset": version * 10 + n,
        }
        for n, (state, at) in enumerate(states)
    ]


def judged(version: int, number: int) -> dict[str, Any]:
    return {"stream": STREAM, "run_id": f"r{version}", "window": number, "offset": number}


THREE = [window(1, 1), window(2, 2), window(3, 3)]
WAITS = run(1, [1], ("trained", 1.5), ("waiting", 2.5))
REJECTED = run(1, [1], ("trained", 1.5), ("rejected", 4))


@pytest.mark.parametrize(
    ("windows", "runs", "evaluations", "rows_to_train", "done"),
    [
        pytest.param([], [], [], 0, True, id="nothing is sealed"),
        pytest.param(THREE[:1], [], [], 0, False, id="the first challenger is in training"),
        pytest.param(THREE, WAITS, [judged(1, 2)], 0, False, id="one waits, and window 3 has not judged it"),
        pytest.param(THREE[:2], WAITS, [judged(1, 2)], 0, True, id="one waits, and every window has judged it"),
        pytest.param(THREE, REJECTED, [judged(1, 2)], 0, True, id="what is trained now learns from all windows"),
        pytest.param([*THREE, window(4, 5)], REJECTED, [judged(1, 2)], 0, False, id="window 4 can judge the next one"),
        pytest.param([*THREE, window(4, 5)], REJECTED, [judged(1, 2)], 31, True, id="30 rows set off no run of 31"),
        pytest.param([*THREE, window(4, 5)], REJECTED, [judged(1, 2)], 30, False, id="30 rows set off a run of 30"),
        pytest.param(THREE, [], [], 31, True, id="too few rows for a first run"),
    ],
)
def test_a_run_is_over_when_no_window_is_left_to_judge_a_challenger_on(
    tmp_path: Path,
    windows: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    rows_to_train: int,
    done: bool,
) -> None:
    rows = {"windows": windows, "runs": runs, "evaluations": evaluations}
    with open_lake_for_writing(load_config({}, state=str(tmp_path))) as lake:
        lake.append({name: pa.Table.from_pylist(some, TABLES[name]) for name, some in rows.items() if some})
        found = sealed_of(lake, STREAM, rows_to_train)
    assert (found.windows, found.done) == (len(windows), done)
