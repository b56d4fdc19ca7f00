"""The view `ground_truth_<stream>`: the stream's current ground truth with inputs and values typed by its contract.

The lake keeps the JSON as it was sent, so a contract may change and every row of before is read by it anew: a field
that is new is null, one that was renamed is found by its old name (docs/decisions/0012).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from accrual.contract import Contract, Field
from accrual.lake import WritableLake
from accrual.lake_tables import view_of
from consumers.expression_sql import quoted

_TYPES = {"string": "varchar", "number": "double", "integer": "bigint", "boolean": "boolean"}


def make_typed_views(lake: WritableLake, contracts: Mapping[str, Contract]) -> None:
    """Make the view of each contract, where there is none or another. Those of contracts that went stay as they are."""
    lake.make_views({view_of(stream): typed_view(contract) for stream, contract in contracts.items()})


def typed_view(contract: Contract, source: str = "ground_truth") -> str:
    """The query: all columns of `source`; `inputs` and `values` as structs, as sent in `inputs_json`, ..."""
    return f"""
        with read as (
            select *, {_read("inputs", contract.inputs)} as i, {_read('"values"', contract.outcome.values)} as v
            from {source} where stream = {quoted(contract.stream)}
        )
        select * exclude (inputs, "values", i, v), {_struct("i", contract.inputs)} as inputs,
            case when v is not null then {_struct("v", contract.outcome.values)} end as "values",
            inputs as inputs_json, "values" as values_json
        from read
    """


def _read(column: str, fields: Mapping[str, Field]) -> str:
    types = {name: _TYPES[field.type] for own, field in fields.items() for name in (own, *field.names_before)}
    return f"from_json({column}, {quoted(json.dumps(types))})"


def _struct(read: str, fields: Mapping[str, Field]) -> str:
    entries = []
    for own, field in fields.items():
        names = [f"{read}.{identifier(name)}" for name in (own, *field.names_before)]
        entries.append(f"{identifier(own)} := " + (f"coalesce({', '.join(names)})" if len(names) > 1 else names[0]))
    return f"struct_pack({', '.join(entries)})"


def identifier(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
