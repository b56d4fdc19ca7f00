"""Typed columns of each stream, through every change of its contract that `accrual contract check --against` allows."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from accrual.contract import Contract, Field, load_contracts
from accrual.events import encode
from accrual.lake import WritableLake
from accrual.lake_tables import view_of
from consumers.typed_views import make_typed_views
from tests.consumers.conftest import STREAM, World

COUNT = Field("integer", optional=True)


def with_inputs(contract: Contract, **more: Field) -> dict[str, Contract]:
    return {STREAM: msgspec.structs.replace(contract, inputs={**contract.inputs, **more})}


def send(world: World, lake: WritableLake, n: int, **inputs: Any) -> None:
    p = world.prediction(n)
    p = msgspec.structs.replace(p, inputs=msgspec.Raw(encode({"text": "It is down", **inputs})))
    world.send(p)
    world.send(world.ground_truth(p, world.outcome(p) if n else None))
    world.pour(lake)


def read(lake: WritableLake) -> list[Any]:
    return [row["inputs"] for row in lake.rows("select inputs from ground_truth_tickets order by predicted_at")]


def files(lake: WritableLake) -> list[dict[str, Any]]:
    return lake.rows("select data_file from ducklake_list_files('lake', 'ground_truth_history') order by all")


def test_rows_of_before_are_read_by_the_contract_of_today(world: World, lake: WritableLake) -> None:
    contract = world.contracts[STREAM]
    make_typed_views(lake, world.contracts)
    send(world, lake, 0)
    assert read(lake) == [{"text": "It is down"}]

    make_typed_views(lake, with_inputs(contract, count=COUNT))
    send(world, lake, 1, count=7)
    written = files(lake)
    assert [row["count"] for row in read(lake)] == [None, 7]

    make_typed_views(lake, with_inputs(contract, count=Field("number", optional=True)))
    send(world, lake, 2, count=7.5)
    assert [row["count"] for row in read(lake)] == [None, 7.0, 7.5]
    assert [type(row["count"]) for row in read(lake)[1:]] == [float, float]

    make_typed_views(lake, with_inputs(contract, tickets=Field("number", optional=True, was="count")))
    send(world, lake, 3, tickets=9.5)
    assert [row["tickets"] for row in read(lake)] == [None, 7.0, 7.5, 9.5]
    assert {row["data_file"] for row in written} <= {row["data_file"] for row in files(lake)}  # nothing was rewritten


def test_values_and_what_was_sent_are_there_too(world: World, lake: WritableLake) -> None:
    make_typed_views(lake, world.contracts)
    send(world, lake, 0, extra="it's \x00")
    send(world, lake, 1)
    expired, labeled = lake.rows("from ground_truth_tickets order by predicted_at")
    assert (expired["values"], expired["values_json"], labeled["values"]) == (None, None, {"urgency": "low"})
    assert msgspec.json.decode(expired["inputs_json"])["extra"] == "it's \x00"
    columns = [c for c in lake.arrow("from ground_truth").column_names if c not in ("inputs", "values")]
    assert set(columns) <= set(labeled)


def test_a_view_is_made_anew_only_for_another_contract(world: World, lake: WritableLake) -> None:
    make_typed_views(lake, world.contracts)
    snapshot = lake.snapshot_id()
    make_typed_views(lake, world.contracts)
    assert lake.snapshot_id() == snapshot
    make_typed_views(lake, with_inputs(world.contracts[STREAM], count=COUNT))
    assert lake.snapshot_id() == snapshot + 1


@pytest.mark.parametrize("name", ["it's", 'say "so"', "select", "Grüße", "a b"])
def test_any_name_of_a_field(world: World, lake: WritableLake, name: str) -> None:
    make_typed_views(lake, with_inputs(world.contracts[STREAM], **{name: COUNT}))
    send(world, lake, 0, **{name: 3})
    assert read(lake)[0][name] == 3


def test_shipped_contracts_have_views(lake: WritableLake) -> None:
    contracts = load_contracts(Path(__file__).parents[2] / "schemas" / "contracts")
    make_typed_views(lake, contracts)
    for stream in contracts:
        assert lake.rows(f"from {view_of(stream)}") == []
