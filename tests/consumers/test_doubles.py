"""Ground truth that came twice on the topic is set apart, once, whatever batches it came in; nothing else is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accrual.lake import Move, WritableLake
from consumers import doubles
from consumers.audit import audit_when_settled
from consumers.doubles import Doubles
from consumers.recompute import EARLIEST, LATEST, Scope
from consumers.rows import arrow_tables, readers
from tests.consumers.conftest import PARTITIONS, Record, World
from tests.consumers.test_sink import ask, running, wait_for_rows


def emit(world: World, n: int, revision: int = 1, urgency: str = "low", after_h: float = 3) -> Record:
    p = world.prediction(n)
    return world.send(world.ground_truth(p, world.outcome(p, timedelta(hours=after_h), urgency), revision))


def take_in(world: World, lake: WritableLake, filter_: Doubles, at: dict[tuple[str, int], int]) -> None:
    """What a sink does with a batch: all that was sent and not taken in yet."""
    tables, _ = arrow_tables(world.records, readers(world.names, world.contracts))  # type: ignore[arg-type]
    ends = {(r.to, r.number): r.at + 1 for r in world.records}
    moves = [Move(*place, at[place], end) for place, end in ends.items()]
    tables |= filter_.set_apart(tables.get("ground_truth_history"), moves)
    assert lake.append(tables, moves)
    at |= ends
    world.records.clear()


def claim(world: World, lake: WritableLake) -> dict[tuple[str, int], int]:
    return lake.claim({(world.names.ground_truth, n): 0 for n in range(PARTITIONS)})


def kept(lake: WritableLake) -> list[tuple[str, int]]:
    return sorted((r["prediction_id"], r["revision"]) for r in lake.rows("from ground_truth_history"))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 12), st.integers(1, 2)), min_size=1, max_size=20), min_size=1, max_size=4
    ),
    restarts=st.sets(st.integers(0, 3)),
)
def test_of_each_revision_the_first_record_is_kept_and_every_other_one_set_apart(
    world: World, lake: WritableLake, batches: Sequence[Sequence[tuple[int, int]]], restarts: set[int]
) -> None:
    for table in ("ground_truth_history", "doubles"):
        lake.rows(f"delete from {table}")
    at, filter_ = claim(world, lake), Doubles(lake)
    sent: Counter[tuple[str, int]] = Counter()
    first: dict[tuple[str, int], int] = {}
    for number, batch in enumerate(batches):
        for n, revision in batch:
            record = emit(world, n, revision)
            key = world.prediction(n).prediction_id, revision
            sent[key] += 1
            first.setdefault(key, record.at)
        if number in restarts:
            filter_ = Doubles(lake)
        take_in(world, lake, filter_, at)
    assert kept(lake) == sorted(sent)
    apart = Counter((r["prediction_id"], r["revision"]) for r in lake.rows("from doubles"))
    assert apart == sent - Counter(dict.fromkeys(sent, 1))
    assert all(r["first_offset"] == first[r["prediction_id"], r["revision"]] for r in lake.rows("from doubles"))


def test_a_double_says_whether_it_is_equal(world: World, lake: WritableLake) -> None:
    at, filter_ = claim(world, lake), Doubles(lake)
    emit(world, 1)
    emit(world, 2)
    take_in(world, lake, filter_, at)
    emit(world, 1)
    emit(world, 2, urgency="high")
    take_in(world, lake, filter_, at)
    found = lake.rows("select prediction_id, why from doubles order by all")
    assert [(r["prediction_id"], r["why"]) for r in found] == [("p-000001", "equal"), ("p-000002", "different")]


def test_digests_that_collide_do_no_harm(world: World, lake: WritableLake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubles, "_digests", lambda rows: np.full(len(rows), 7))
    at, filter_ = claim(world, lake), Doubles(lake)
    for n in (1, 2, 1, 3):
        emit(world, n)
    take_in(world, lake, filter_, at)
    for n in (4, 3):
        emit(world, n)
    take_in(world, lake, filter_, at)
    assert [name for name, _ in kept(lake)] == [f"p-00000{n}" for n in (1, 2, 3, 4)]
    assert lake.rows("select count(*) as n from doubles")[0]["n"] == 2


def test_what_another_sink_wrote_meanwhile_is_known(world: World, lake: WritableLake) -> None:
    at, filter_, other = claim(world, lake), Doubles(lake), Doubles(lake)
    emit(world, 1)
    take_in(world, lake, filter_, at)
    emit(world, 2)
    take_in(world, lake, other, at)
    emit(world, 2)
    take_in(world, lake, filter_, at)
    assert lake.rows("select count(*) as n from doubles")[0]["n"] == 1


def test_it_forgets_the_oldest_first(world: World, lake: WritableLake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubles, "REMEMBERED", 4)
    at, filter_ = claim(world, lake), Doubles(lake)
    for n in range(30):
        emit(world, n)
        take_in(world, lake, filter_, at)
    emit(world, 29)
    emit(world, 0)
    take_in(world, lake, filter_, at)
    assert [r["prediction_id"] for r in lake.rows("from doubles")] == ["p-000029"]


def test_the_sink_sets_doubles_apart_and_says_so(kafka_world: World) -> None:
    for n in range(20):
        emit(kafka_world, n)
    emit(kafka_world, 3)
    kafka_world.publish()
    with running(kafka_world) as progress:
        wait_for_rows(kafka_world.config, {"ground_truth_history": 20, "doubles": 1})
        emit(kafka_world, 4)
        kafka_world.publish()
        wait_for_rows(kafka_world.config, {"ground_truth_history": 20, "doubles": 2})
        assert progress.health()["doubles"] == 2
    found = audit_when_settled(kafka_world.config, kafka_world.contracts, Scope(None, EARLIEST, LATEST))
    assert {d.id for d in found.differences if d.kind == "double record"} == {"p-000003", "p-000004"}
    assert not [d for d in found.differences if d.kind == "double row"]
    assert [r["prediction_id"] for r in ask(kafka_world.config, "from doubles order by all")] == [
        "p-000003",
        "p-000004",
    ]
