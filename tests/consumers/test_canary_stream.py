"""What became of canaries, by the tables of the lake."""

from __future__ import annotations

import pyarrow as pa

from accrual.lake import WritableLake
from accrual.lake_tables import TABLES
from consumers.canary_stream import Fate, fates, missed
from tests.consumers.conftest import START, World


def test_a_rule_that_lets_a_canary_through_is_named_once_its_window_was_checked(
    world: World, lake: WritableLake
) -> None:
    for n, name in enumerate(["mail", "long", "mail", "long", "mail"]):
        p = world.prediction(n, prediction_id=f"canary/{name}/5/{n}")
        for event in (p, o := world.outcome(p), world.ground_truth(p, o)):
            world.send(event)
    world.pour(lake)
    contract = world.contracts["tickets"]
    waiting = [Fate("long", 2, 0, 0, 0), Fate("mail", 3, 0, 0, 0)]
    assert fates(lake, contract) == waiting and missed(waiting, contract) == []
    caught = {"stream": "tickets", "window": 1, "revision": 1, "state": "quarantined", "at": START, "by": "sink"}
    rows = [
        {**caught, "prediction_id": "canary/mail/5/0", "rule": "mail"},
        {**caught, "prediction_id": "canary/long/5/1", "rule": "mail"},  # by another rule than its own
        {**caught, "prediction_id": "canary/long/5/3", "rule": "long"},
    ]
    lake.append({"quarantine": pa.Table.from_pylist(rows, TABLES["quarantine"])})
    found = fates(lake, contract)
    assert found == [Fate("long", 2, 0, 1, 2), Fate("mail", 3, 0, 1, 2)], "the last one waits for its window"
    assert [fate.recall for fate in found] == [0.5, 0.5]
    assert missed(found, contract) == ["long", "mail"]
