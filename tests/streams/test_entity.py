"""Outcomes that name an entity: whose they are, in any order of events, and what that does to the rows."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrual.contract import Contract
from accrual.events import GroundTruth, Outcome, Prediction, Tick, encode, instant
from streams.entity import Entity, Made, add_outcome, add_prediction, due, is_refused, on_time, unpack_entity
from streams.join import Waiting, pack
from streams.label import Seen
from tests.streams.test_partition import HOUR, START, World, current

HORIZON = timedelta(hours=5)


def contract(to: str, disorder: str = "1h") -> Contract:
    return msgspec.convert(
        {
            "stream": "toy",
            "join": {"by": "loan_id", "to": to},
            "inputs": {"x": {"type": "number"}},
            "output": {"classes": ["yes", "no"]},
            "outcome": {"values": {"answer": {"type": "string"}}},
            "label": {"field": "answer"},
            "horizon": "5h",
            "disorder": disorder,
            "remember": "1000h",
            "training": {"template": "{x}"},
        },
        Contract,
    )


def prediction(number: int, loan: int) -> Prediction:
    return Prediction(
        prediction_id=f"id{number}-{loan}",
        entity=f"loan{loan}",
        stream="toy",
        model="toy@0",
        predicted_at=instant(START + number * HOUR),
        inputs=msgspec.Raw(b'{"x":1}'),
        output=msgspec.Raw(b'{"label":"yes","probabilities":{"yes":1}}'),
    )


def outcome(hour: int, loan: int, answer: str = "yes") -> Outcome:
    return Outcome(
        entity=f"loan{loan}",
        stream="toy",
        observed_at=instant(START + hour * HOUR),
        values=msgspec.Raw(encode({"answer": answer})),
    )


def owners(event: Outcome, predictions: list[Prediction], to: str) -> list[Prediction]:
    """By the definition: the predictions of its entity within the horizon before it; the latest, or all."""
    candidates = [
        p
        for p in predictions
        if p.entity == event.entity and p.predicted_at <= event.observed_at <= p.predicted_at + HORIZON
    ]
    return sorted(candidates, key=lambda p: p.predicted_at)[-1:] if to == "latest" else candidates


def expected(predictions: list[Prediction], outcomes: list[Outcome], to: str) -> dict[str, tuple[int, str | None]]:
    """Revision and label of each prediction."""
    own: defaultdict[str, list[Outcome]] = defaultdict(list)
    for event in outcomes:
        for owner in owners(event, predictions, to):
            own[owner.prediction_id].append(event)
    rows: dict[str, tuple[int, str | None]] = {}
    for p in predictions:
        last = max(own[p.prediction_id], key=lambda o: (o.observed_at, bytes(o.values)), default=None)
        rows[p.prediction_id] = (
            len(own[p.prediction_id]),
            msgspec.json.decode(last.values)["answer"] if last else None,
        )
    return rows


def found(rows: list[GroundTruth]) -> dict[str, tuple[int, str | None]]:
    return {id_: (row.revision, row.label) for id_, row in current(rows).items()}


def finish(world: World) -> None:
    """So much time passes that everything is settled and nothing forgotten."""
    world.turn([], Tick(tick="toy", at=instant(START + 500 * HOUR)))
    for _ in range(3):
        world.turn([])


hours, loans = st.integers(0, 11), st.integers(0, 1)
events = st.one_of(
    st.builds(prediction, hours, loans), st.builds(outcome, hours, loans, st.sampled_from(["yes", "no"]))
)
happenings = st.lists(st.one_of(st.lists(events, max_size=8), st.just("killed")), max_size=12)


@pytest.mark.parametrize("to", ["latest", "all"])
@pytest.mark.parametrize("disorder", ["1h", "100h"])
@settings(max_examples=60, deadline=None)
@given(story=happenings)
def test_whose_an_outcome_is_follows_from_the_events_in_any_order(to: str, disorder: str, story: list[object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), contract(to, disorder))
        for happening in story:
            if isinstance(happening, list):
                world.turn(happening)
            else:
                world.kill()
        finish(world)
        refused = {letter.prediction_id for letter in world.letters if letter.reason == "too_old"}
        taken = {e.prediction_id: e for e in world.came if isinstance(e, Prediction) and e.prediction_id not in refused}
        outcomes = [*{encode(e): e for e in world.came if isinstance(e, Outcome)}.values()]
        assert found(world.rows) == expected([*taken.values()], outcomes, to)
        orphans = [letter.value for letter in world.letters if letter.reason == "orphan"]
        lonely = [encode(o) for o in outcomes if not owners(o, [*taken.values()], to)]
        assert sorted(orphans, key=bytes) == sorted(lonely)  # type: ignore[arg-type]
        assert all(row.entity == taken[row.prediction_id].entity for row in world.rows)
        assert world.pending == 0
        if disorder == "100h":
            assert not refused, "nothing is refused that is no more out of order than the contract says"
        world.partition.state.close()


def test_an_outcome_waits_until_no_earlier_prediction_can_come(tmp_path: Path) -> None:
    world = World(tmp_path, contract("latest"))
    world.turn([prediction(0, 1), outcome(3, 1)])
    assert world.rows == []
    world.turn([prediction(2, 1)])
    world.turn([prediction(4, 2), outcome(5, 2)])
    world.turn([])
    assert found(world.rows) == {"id2-1": (1, "yes")}, "the later of the two, though it came after the outcome"
    world.partition.state.close()


def test_a_prediction_that_comes_after_its_outcome_was_given_away_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, contract("latest"))
    world.turn([prediction(0, 1), outcome(3, 1)])
    world.turn([outcome(10, 2)])
    world.turn([])
    assert found(world.rows) == {"id0-1": (1, "yes")}
    world.turn([prediction(2, 1), prediction(4, 1)])
    [letter] = world.letters
    assert (letter.reason, letter.prediction_id, letter.key) == ("too_old", "id2-1", b"loan1")
    assert "given to another" in letter.detail
    finish(world)
    assert found(world.rows) == {"id0-1": (1, "yes"), "id4-1": (0, None)}
    world.partition.state.close()


def test_a_sent_twice_outcome_counts_once_also_after_it_was_given_away(tmp_path: Path) -> None:
    world = World(tmp_path, contract("all"))
    world.turn([prediction(0, 1), prediction(1, 1), outcome(3, 1), outcome(3, 1)])
    world.turn([outcome(10, 2)])
    world.turn([])
    world.kill()
    world.turn([outcome(3, 1)])
    finish(world)
    assert found(world.rows) == {"id0-1": (1, "yes"), "id1-1": (1, "yes")}
    world.partition.state.close()


def test_an_entity_is_forgotten_with_its_predictions() -> None:
    rule = contract("latest")
    entity = add_outcome(add_prediction(None, Made(0, "a")), Waiting(Seen(HOUR, b"{}", "s", "yes"), 0, b""))
    assert entity is not None and unpack_entity(pack(entity)) == entity
    assert due(entity, rule) == HOUR + 1
    passed = on_time(entity, rule, HOUR + 1)
    assert [claim.prediction_id for claim in passed.claims] == ["a"]
    assert passed.entity is not None and is_refused(passed.entity, rule, Made(HOUR, "b"))
    assert not is_refused(passed.entity, rule, Made(2 * HOUR, "b"))
    assert due(passed.entity, rule) == 1005 * HOUR + 1
    assert on_time(passed.entity, rule, 1007 * HOUR).entity is None
    assert on_time(Entity(), rule, 0).entity is None
