"""A few seeds of the sink's chaos suite; `make chaos-sink SEEDS=200` runs many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos_sink.faults import EMBEDDED, KINDS, PRODUCTION, plan
from tests.chaos_sink.run import servers
from tests.chaos_sink.seed import run_seed


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [next(n for n in range(99) if plan(n).production == wanted) for wanted in (False, True)]
)
def test_nothing_is_lost_doubled_or_wrong(bootstrap: str, s3_program: Path | None, seed: int, tmp_path: Path) -> None:
    with servers(tmp_path) as (postgres, store):
        result = run_seed(seed, bootstrap, tmp_path / "seed", postgres, store)
    assert result.injected
    assert result.compared > 1_000
    assert not result.failed, result.report()


def test_a_plan_follows_from_its_seed_and_every_kind_of_fault_comes_up() -> None:
    assert [plan(seed) for seed in range(50)] == [plan(seed) for seed in range(50)]
    for production, kinds in ((False, EMBEDDED), (True, PRODUCTION)):
        plans = [plan(seed) for seed in range(60) if plan(seed).production == production]
        assert {fault.kind for one in plans for fault in one.faults} == set(kinds)
        assert all(one.faults for one in plans)
    assert {*EMBEDDED, *PRODUCTION} == KINDS.keys()
