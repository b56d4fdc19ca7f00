"""The audit of a stream that is joined by an entity agrees with the join, and finds what is planted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from accrual.contract import Contract
from accrual.events import Outcome, Prediction
from accrual.kafka import TopicNames
from accrual.lake import Move, WritableLake
from consumers.audit import audit
from consumers.recompute import Scope
from consumers.rows import arrow_tables, readers
from tests.consumers.conftest import Record
from tests.streams.test_entity import contract, finish, outcome, prediction
from tests.streams.test_partition import World

NAMES = TopicNames("test")
LATER_MS = 1_764_000_000_000 + 600 * 3_600_000  # the broker's clock: after all events


def played(folder: Path, rule: Contract, seed: int) -> World:
    """A stream with predictions and outcomes of a few loans, many of them late, twice or in conflict."""
    chance = random.Random(seed)
    world = World(folder, rule)
    for hour in range(40):
        batch: list[Prediction | Outcome] = []
        for _ in range(chance.randrange(6)):
            loan, when = chance.randrange(4), max(0, hour - chance.choice([0, 0, 0, 1, 3]))
            batch.append(prediction(when, loan))
            if chance.random() < 0.7:
                batch.append(
                    outcome(max(0, when + chance.choice([-1, 0, 1, 3, 7])), loan, chance.choice(["yes", "no"]))
                )
        world.turn(batch + batch[:1])
    finish(world)
    world.partition.state.close()
    return world


def poured(lake: WritableLake, world: World, rule: Contract) -> None:
    ends: Counter[str] = Counter()
    records = []
    for number, (topic, key, value) in enumerate(world.log):
        name = getattr(NAMES, topic)
        records.append(Record(name, 0, ends[name], key, value, LATER_MS + number))
        ends[name] += 1
    tables, skipped = arrow_tables(records, readers(NAMES, {"toy": rule}))  # type: ignore[arg-type]
    assert skipped == []
    lake.claim({(name, 0): 0 for name in ends})
    assert lake.append(tables, [Move(name, 0, 0, end) for name, end in ends.items()])


@pytest.mark.parametrize("to", ["latest", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_the_books_of_a_stream_joined_by_an_entity_balance(
    lake: WritableLake, tmp_path: Path, to: str, seed: int
) -> None:
    rule = contract(to)
    world = played(tmp_path / "join", rule, seed)
    reasons = Counter(letter.reason for letter in world.letters)
    assert reasons["orphan"] and reasons["too_old"] and len(world.rows) > 50
    poured(lake, world, rule)
    found = audit(lake, {"toy": rule}, NAMES, Scope())
    assert found.differences == []
    assert found.balanced
    [outcomes] = found.outcomes
    assert outcomes.orphaned and outcomes.in_labels and outcomes.duplicate


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (
            "update ground_truth_history set label = case label when 'yes' then 'no' else 'yes' end",
            "label",
        ),
        ("delete from ground_truth_history where status = 'labeled' and offset < 30", "missing"),
        ("update dead_letters set reason = 'orphan' where reason = 'too_old'", "missing"),
        ("update outcomes set entity = 'loan9' where entity = 'loan1'", "revision"),
        ("delete from dead_letters where reason = 'orphan'", "no dead letter"),
    ],
)
def test_what_is_planted_in_such_a_stream_is_found(lake: WritableLake, tmp_path: Path, fault: str, kind: str) -> None:
    rule = contract("latest")
    poured(lake, played(tmp_path / "join", rule, 1), rule)
    lake.rows(fault.replace(" offset", ' "offset"'))
    found = audit(lake, {"toy": rule}, NAMES, Scope())
    kinds = {difference.kind for difference in found.differences}
    assert not found.balanced
    assert kind in kinds, found.differences
