"""A quality section that makes no sense is refused when the contract is read, with the rule and the fix."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from accrual.contract import load_contract
from accrual.errors import ContractError
from accrual.quality_rules import METRICS, Bound

BASE: dict[str, Any] = {
    "stream": "loans",
    "inputs": {"amount": {"type": "number"}, "title": {"type": "string"}},
    "output": {"classes": ["good", "bad"]},
    "outcome": {"values": {"status": {"type": "string"}, "days": {"type": "integer"}}},
    "label": {"field": "status"},
    "horizon": "1d",
    "training": {"template": "{title}"},
}
FINE = {"name": "r", "field": "amount", "range": {"least": 0}}


def load(folder: Path, quality: dict[str, Any]) -> None:
    path = folder / "loans.yaml"
    path.write_text(yaml.safe_dump({**BASE, "quality": quality}))
    load_contract(path)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rules": [FINE, FINE]}, "r: another rule has this name too"),
    ({"rules": [{**FINE, "name": ""}]}, "give it a name"),
    ({"rules": [{"name": "r", "field": "amount"}]}, "give exactly one of range, categories"),
    ({"rules": [{**FINE, "pii": "forbid"}]}, "give exactly one of range, categories"),
    ({"rules": [{**FINE, "field": "amuont"}]}, "field must be one of amount, title, values.days, values.status"),
    ({"rules": [{**FINE, "field": "title"}]}, "range is about a number, and title is a string"),
    ({"rules": [{"name": "r", "field": "values.days", "pii": "forbid"}]}, "pii is about a string"),
    ({"rules": [{**FINE, "range": {}}]}, "range: give least, most or both"),
    ({"rules": [{**FINE, "range": {"least": 2, "most": 1}}]}, "least is greater than most"),
    ({"rules": [{"name": "r", "field": "title", "categories": []}]}, "categories: name at least one"),
    ({"rules": [{"name": "r", "field": "title", "matches": "a(?=b)"}]}, "matches: Invalid regular expression"),
    ({"rules": [{"name": "r", "field": "title", "scripts": ["latin"]}]}, "'latin' is no script of Unicode's"),
    ({"rules": [{"name": "r", "field": "title", "scripts": []}]}, "scripts: name at least one"),
    ({"rules": [{"name": "r", "expression": "amount + 1"}]}, "says no true or false"),
    ({"rules": [{"name": "r", "expression": "amount < lenght"}]}, "expression: at column 10"),
    ({"rules": [{"name": "r", "field": "amount", "expression": "amount < 1"}]}, "leave field out"),
    ({"rules": [{**FINE, "severity": "fatal"}]}, "Invalid enum value 'fatal'"),
    ({"bounds": [{"metric": "psi"}]}, "psi: give least, most or both"),
    ({"bounds": [{"metric": "psi", "field": "titel", "most": 1}]}, "it must be one of amount, title, label"),
    ({"bounds": [{"metric": "duplicates", "field": "title", "most": 1}]}, "left out: the metric is one number"),
    ({"bounds": [{"metric": "violations", "field": "r2", "most": 1}], "rules": [FINE]}, "it must be one of r"),
    ({"bounds": [{"metric": "entropy", "most": 1}]}, "Invalid enum value 'entropy'"),
    ({"text": "amount"}, "'amount' is not a string of inputs"),
    ({"slices": ["amount"]}, "'amount' is not a string, integer or boolean of inputs"),
    ({"canaries": {"recall": 2}}, "recall is a share"),
]


@pytest.mark.parametrize(("quality", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_what_makes_no_sense_is_refused(tmp_path: Path, quality: dict[str, Any], problem: str) -> None:
    with pytest.raises(ContractError) as refused:
        load(tmp_path, quality)
    assert problem in str(refused.value) and "quality" in str(refused.value)


def test_what_makes_sense_is_read(tmp_path: Path) -> None:
    rules = [FINE, {"name": "e", "expression": "amount > values_days or title == 'x'", "severity": "warn"}]
    bounds = [{"metric": metric, "most": 1} for metric in METRICS]
    load(tmp_path, {"rules": rules, "bounds": bounds, "text": "title", "slices": ["title"], "canaries": {}})


@pytest.mark.parametrize(("value", "holds"), [(0.99, False), (1.0, True), (2.0, True), (2.01, False)])
def test_a_bound_includes_its_ends(value: float, holds: bool) -> None:
    bound = Bound(metric="psi", least=1, most=2)
    assert bound.holds(value) is holds and str(bound) == "at least 1, at most 2"
