"""Which changes of a contract its stream survives."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from accrual.contract import Contract, load_contract
from accrual.contract_change import breaking_changes
from accrual.errors import ContractError, Rejected

BEFORE = """
stream: loans
inputs:
  amount: {type: integer, minimum: 0}
  purpose: {type: string, max_length: 20}
  income: {type: number, optional: true}
output: {classes: [paid, lost]}
outcome:
  values: {status: {type: string}, days: {type: integer, optional: true}}
label: {field: status}
horizon: 30d
on_expiry: paid
training: {template: '{purpose}'}
"""


def contract(tmp_path: Path, **changes: Any) -> Contract:
    """The contract with keys replaced: `inputs__amount={...}`, None to remove."""
    document = yaml.safe_load(BEFORE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = document
        for key in parents:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path = tmp_path / "contract.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_contract(path)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs__term": {"type": "integer", "optional": True}},
        {"inputs__amount": {"type": "number", "minimum": -1}},
        {"inputs__amount": {"type": "integer"}},
        {"inputs__purpose": {"type": "string", "optional": True, "max_length": 30}},
        {
            "inputs__purpose": None,
            "inputs__reason": {"type": "string", "was": "purpose"},
            "training__template": "x {reason}",
        },
        {"outcome__values__days": {"type": "number", "optional": True}},
        {"output__classes": ["paid", "lost", "open"]},
        {"description": "for people"},
        {"disorder": "2h", "remember": "60d", "training__window_rows": 77},
    ],
)
def test_what_may_change(tmp_path: Path, change: dict[str, Any]) -> None:
    assert breaking_changes(contract(tmp_path), contract(tmp_path, **change)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stream": "leases"}, "another stream"),
        ({"inputs__income": None}, "inputs.income: removed"),
        ({"inputs__income": {"type": "number"}}, "inputs.income: was optional"),
        ({"inputs__income": {"type": "integer", "optional": True}}, "type number is now integer"),
        ({"inputs__amount": {"type": "string"}}, "type integer is now string"),
        ({"inputs__amount": {"type": "integer", "minimum": 1}}, "minimum is now 1"),
        ({"inputs__amount": {"type": "integer", "minimum": 0, "maximum": 9}}, "maximum is now 9"),
        ({"inputs__purpose": {"type": "string", "max_length": 19}}, "max_length is now 19"),
        ({"inputs__term": {"type": "integer"}}, "inputs.term: new and required"),
        (
            {"inputs__amount": None, "inputs__sum": {"type": "string", "was": "amount"}},
            r"inputs.amount \(now sum\): type integer is now string",
        ),
        ({"outcome__values__days": None}, "outcome.values.days: removed"),
        ({"output__classes": ["paid", "gone"]}, "lost removed"),
        ({"label": {"field": "status", "take": "first"}}, "label: changed"),
        ({"horizon": "31d"}, "horizon: changed"),
        ({"on_expiry": "lost"}, "on_expiry: changed"),
        ({"late": "revise"}, "late: changed"),
    ],
)
def test_what_may_not(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    [found] = breaking_changes(contract(tmp_path), contract(tmp_path, **change))
    assert re.search(reason, found), found


def test_another_unit_of_the_same_horizon_is_no_change(tmp_path: Path) -> None:
    assert breaking_changes(contract(tmp_path), contract(tmp_path, horizon="720h")) == []


def test_a_number_the_label_comes_from_may_not_be_widened(tmp_path: Path) -> None:
    from_days = {"label": {"expression": "'lost' if days > 90 else 'paid'"}}
    before = contract(tmp_path, **from_days)
    after = contract(tmp_path, **from_days, outcome__values__days={"type": "number", "optional": True})
    assert "the label comes from it" in breaking_changes(before, after)[0]


def test_a_name_of_before_may_not_be_forgotten(tmp_path: Path) -> None:
    once = contract(tmp_path, inputs__amount={"type": "integer", "minimum": 0, "was": "sum"})
    assert "keep it in `was`" in breaking_changes(once, contract(tmp_path))[0]


def test_a_renamed_field_is_read_by_either_name(tmp_path: Path) -> None:
    renamed = contract(tmp_path, inputs__amount={"type": "integer", "minimum": 0, "was": ["sum", "total"]})
    for name in ("amount", "sum", "total"):
        raw = b'{"%s":3,"purpose":"car"}' % name.encode()
        renamed.check_inputs(raw)
        assert renamed.decode_inputs(raw) == {"amount": 3, "purpose": "car", "income": None}
    for raw in (b'{"purpose":"car"}', b'{"sum":-1,"purpose":"car"}', b'{"sum":null,"purpose":"car"}'):
        with pytest.raises(Rejected):
            renamed.check_inputs(raw)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"inputs__amount": {"type": "integer", "was": "purpose"}}, "the name of another field too"),
        ({"inputs__Purpose": {"type": "string"}}, "the name of another field too"),
        ({"outcome__values__status": {"type": "string", "was": "state"}}, "keeps its name"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ContractError, match=problem):
        contract(tmp_path, **change)
