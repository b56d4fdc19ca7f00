"""Contracts: what ships is valid; every error names line, field and fix; payload checks reject what they should."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from accrual.contract import Contract, load_contract, load_contracts, parse_duration
from accrual.errors import ContractError, Rejected
from accrual.training_policy import Gate, Slices

SHIPPED = Path(__file__).parents[2] / "schemas" / "contracts"


@pytest.fixture
def credit() -> Contract:
    return load_contract(SHIPPED / "credit-risk.yaml")


@pytest.fixture
def support() -> Contract:
    return load_contract(SHIPPED / "support-intents.yaml")


def test_the_shipped_contracts_are_valid() -> None:
    assert set(load_contracts(SHIPPED)) == {
        "argument-ranking",
        "assistant-intents",
        "comment-emotions",
        "credit-risk",
        "restaurant-texts",
        "support-intents",
        "text-similarity",
        "venue-choices",
        "venue-replies",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", timedelta(milliseconds=500)),
        ("12h", timedelta(hours=12)),
        ("1y", timedelta(days=365)),
        ("30d", timedelta(days=30)),
    ],
)
def test_durations(text: str, expected: timedelta) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "1.5d", "3 days", "30d12h"])
def test_what_is_no_duration_says_what_is(text: str) -> None:
    with pytest.raises(ValueError, match="write a whole number and a unit"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("old", "new", "field", "fix"),
    [
        ("horizon: 14d", "horizon: two weeks", "horizon", "write a whole number and a unit"),
        ("epochs: 3", "epochs: three", "training.epochs", "Expected `int`"),
        ("epochs: 3", "epochs: 0", "training.epochs", "at least 1"),
        ("field: intent", "field: intnt", "label.field", "is not in outcome.values"),
        ("late: revise", "lat: revise", "lat", "write `late`, or remove it"),
        ("late: revise", "zebra: revise", "zebra", "correct its spelling"),
        ("late: revise", "late: perhaps", "late", "Invalid enum value"),
        ("late: revise", "late: revise\njoin: {by: loan_id}", "late", "needs the prediction's id"),
        (
            "on_expiry: censored",
            "on_expiry: nothing",
            "on_expiry",
            "neither `censored` nor one of output.classes",
        ),
        ("label:\n  field: intent", "label: {field: intent, expression: intent}", "label", "give exactly one of field"),
        ("field: intent", "expression: intnt", "label.expression", "'intnt' is not in outcome.values"),
        ("field: intent", "expression: None", "label.expression", "always None"),
        ('template: "{text}"', 'template: "{txt}"', "training.template", "is not one of inputs"),
        ('template: "{text}"', 'template: "text"', "training.template", "names no input"),
        ("alpha: 0.05", "alpha: 5", "gate.alpha", "between 0 and 1"),
        ("alpha: 0.05", "slices: {fields: [grade]}", "gate.slices.fields", "is not one of inputs"),
        ("alpha: 0.05", "slices: {fields: []}", "gate.slices.fields", "name an input"),
        ("alpha: 0.05", "slices: {fields: [text], most_loss: 2}", "gate.slices.most_loss", "between 0 and 2"),
        ("alpha: 0.05", "slices: {fields: [text], least_rows: 5}", "gate.slices.least_rows", "at least 10"),
        ("most_loss: 0.02", "most_loss: 1", "gate.retention.most_loss", "between 0 and 1"),
        ("epochs: 3", "calibration: warm", "training.calibration", "write one of auto, beta, isotonic, none, platt"),
        ("epochs: 3", "triggers: {drift: {metric: ks, most: 1}}", "training.triggers", "one of jensen_shannon, psi"),
        ("epochs: 3", "epoch: 3", "epoch", "write `epochs`, or remove it"),
        ("alpha: 16", "alpha: -1", "training.lora", "rank, alpha and layers must be at least 1"),
        ("alpha: 0.05", "max_ece_increase: -1", "gate.max_ece_increase", "0 to 1"),
    ],
)
def test_an_error_names_line_field_and_fix(tmp_path: Path, old: str, new: str, field: str, fix: str) -> None:
    text = (SHIPPED / "support-intents.yaml").read_text()
    assert text.count(old) == 1
    path = tmp_path / "broken.yaml"
    path.write_text(text.replace(old, new))
    line = text[: text.index(old)].count("\n") + 1
    with pytest.raises(ContractError) as error:
        load_contract(path)
    message = str(error.value)
    assert f"broken.yaml:{line}:" in message
    assert field.split(".")[-1] in message
    assert fix in message


@pytest.mark.parametrize(
    ("label", "field", "fix"),
    [
        ({}, "label", "give exactly one of field (an outcome value) and expression"),
        ({"field": "amount", "take": "sum"}, "label.thresholds", "`take: sum` needs it"),
        ({"field": "amount", "take": "sum", "thresholds": {}}, "label.thresholds", "`take: sum` needs it"),
        ({"field": "amount", "thresholds": {"paid": 1}}, "label.thresholds", "needs `take: sum`"),
        ({"field": "status", "take": "sum", "thresholds": {"paid": 1}}, "label.field", "`take: sum` adds numbers"),
        (
            {"expression": "amount > 1", "take": "sum", "thresholds": {"paid": 1}},
            "label.expression",
            "is a boolean; `take: sum` adds numbers",
        ),
        (
            {"field": "amount", "take": "sum", "thresholds": {"lost": 1}},
            "label.thresholds",
            "not one of output.classes",
        ),
        (
            {"field": "amount", "take": "sum", "thresholds": {"paid": 1, "charged_off": 1}},
            "label.thresholds",
            "same least sum",
        ),
        (
            {"field": "amount", "take": "sum", "thresholds": {"paid": 0.1, "charged_off": 0.1 + 1e-9}},
            "label.thresholds",
            "same least sum",
        ),
        ({"field": "amount", "take": "sum", "thresholds": {"paid": 1e16}}, "label.thresholds", "at most 1e+15"),
        (
            {"field": "amount", "take": "sum", "thresholds": {"paid": 1}, "map": {"1.0": "paid"}},
            "label.map",
            "has no use with `take: sum`",
        ),
        ({"field": "status", "map": {"Fully Paid": "lost"}}, "label.map", "'lost' is not one of output.classes"),
        ({"field": "status", "complete_when": 0}, "label.complete_when", "at least 1"),
        ({"field": "status", "sources": []}, "label.sources", "names at least one source"),
        ({"field": "status", "sources": ["a", "a"]}, "label.sources", "each once"),
        ({"field": "status", "take": "most"}, "label.take", "Invalid enum value"),
        (
            {"expression": "'lost' if amount > 1 else 'paid'"},
            "label.expression",
            "'lost' is not one of output.classes; add it there",
        ),
        (
            {"expression": "'late' if amount > 1 else status", "map": {"Fully Paid": "paid"}},
            "label.expression",
            "'late' is not one of label.map; add it there",
        ),
        (
            {"expression": "'paid' if amount else None"},
            "label.expression",
            "at column 11, `amount`: a boolean is needed",
        ),
        ({"expression": "None"}, "label.expression", "always None"),
    ],
)
def test_a_label_rule_that_makes_no_sense_is_named(tmp_path: Path, label: dict[str, Any], field: str, fix: str) -> None:
    with pytest.raises(ContractError) as error:
        load_contract(_with_label(tmp_path, label))
    assert field in str(error.value)
    assert fix in str(error.value)


def _with_label(folder: Path, label: dict[str, Any]) -> Path:
    """The credit contract with another label, and an amount in its outcomes."""
    document = yaml.safe_load((SHIPPED / "credit-risk.yaml").read_text())
    document["outcome"]["values"]["amount"] = {"type": "number", "optional": True}
    document["label"] = label
    path = folder / "contract.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_an_expression_gives_the_label(tmp_path: Path) -> None:
    text = "'charged_off' if status == 'Charged Off' or amount < 0 else 'paid' if status == 'Fully Paid' else status"
    rule = load_contract(_with_label(tmp_path, {"expression": text}))
    assert rule.label_of({"status": "Fully Paid", "amount": -1.0}) == "charged_off"
    assert rule.label_of({"status": "Fully Paid"}) == "paid"
    with pytest.raises(Rejected, match="label 'Current' is not one of output"):
        rule.label_of({"status": "Current"})
    nothing = load_contract(_with_label(tmp_path, {"expression": "'paid' if amount > 1 else None"}))
    with pytest.raises(Rejected, match=r"label\.expression is null"):
        nothing.label_of({"status": "Current"})
    mapped = load_contract(_with_label(tmp_path, {"expression": "amount > 1", "map": {"True": "paid"}}))
    assert mapped.label_of({"amount": 2.0}) == "paid"
    with pytest.raises(Rejected, match=r"label\.expression is 'False'; label\.map knows \['True'\]"):
        mapped.label_of({"amount": 1.0})


def test_a_sum_takes_numbers_that_take_no_label_back(tmp_path: Path) -> None:
    rule = {"field": "amount", "take": "sum", "thresholds": {"paid": 3, "charged_off": 1}}
    strict = load_contract(_with_label(tmp_path, rule))
    assert strict.label_of({"amount": 2.5}) == "2.5"
    assert strict.label_of({"amount": -0.0}) == "0.0"
    with pytest.raises(Rejected, match=r"below 0 needs a threshold of -\.inf"):
        strict.label_of({"amount": -1.0})
    with pytest.raises(Rejected, match="at most 1e"):
        strict.label_of({"amount": 2e15})
    rule["thresholds"] = {"paid": 3, "charged_off": -float("inf")}
    assert load_contract(_with_label(tmp_path, rule)).label_of({"amount": -1.0}) == "-1.0"


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    document = yaml.safe_load((SHIPPED / "support-intents.yaml").read_text())
    del document["horizon"]
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ContractError, match="missing required field `horizon`; add it"):
        load_contract(path)


def test_a_key_twice_and_a_number_that_is_none_are_mistakes_and_an_exponent_is_a_number(tmp_path: Path) -> None:
    text, path = (SHIPPED / "support-intents.yaml").read_text(), tmp_path / "written.yaml"
    for old, new, said in (
        ("epochs: 3", "epochs: 3\n  epochs: 30", "'epochs' is there twice"),
        ("alpha: 0.05", "alpha: .nan", ".nan is no number"),
    ):
        path.write_text(text.replace(old, new))
        line = text[: text.index(old)].count("\n") + new.count("\n") + 1
        with pytest.raises(ContractError, match=f"{said} in .*, line {line}, "):
            load_contract(path)
    path.write_text(text.replace("alpha: 0.05", "alpha: 5e-2").replace("learning_rate: 0.001", "learning_rate: 1e-3"))
    assert load_contract(path) == load_contract(SHIPPED / "support-intents.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "\x00"])
def test_what_is_no_contract_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ContractError, match=r"broken\.yaml"):
        load_contract(path)


def test_two_contracts_for_one_stream_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="no contract"):
        load_contracts(tmp_path)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text((SHIPPED / "support-intents.yaml").read_text())
    with pytest.raises(ContractError, match="has another contract"):
        load_contracts(tmp_path)


def test_labels_follow_the_contract(credit: Contract, support: Contract) -> None:
    assert credit.label_of({"status": "Charged Off"}) == "charged_off"
    assert support.label_of({"intent": "an intent nobody knew at launch"}) == "an intent nobody knew at launch"
    with pytest.raises(Rejected, match=r"label\.map knows"):
        credit.label_of({"status": "Current"})
    with pytest.raises(Rejected, match="is missing"):
        credit.label_of({})


@pytest.mark.parametrize(
    "raw",
    [b"{}", b'{"text": 1}', b'{"text": null}', b'{"text": "' + b"x" * 5000 + b'"}', b"[]", b"nonsense", b""],
)
def test_inputs_that_break_the_contract(support: Contract, raw: bytes) -> None:
    with pytest.raises(Rejected) as error:
        support.decode_inputs(raw)
    assert error.value.reason == "invalid_inputs"


def test_extra_inputs_ride_along_and_optional_ones_may_be_null(credit: Contract) -> None:
    raw = (
        b'{"amount": 1000, "term_months": 36, "interest_rate": 0.1, "grade": "A", "purpose": "car",'
        b' "home_ownership": "OWN", "title": null, "something_new": [1, 2]}'
    )
    inputs = credit.decode_inputs(raw)
    assert inputs["amount"] == 1000.0
    assert inputs["title"] is None
    assert "something_new" not in inputs


def test_a_template_says_when_a_value_is_missing(credit: Contract) -> None:
    text = credit.render({"amount": 7500.0, "grade": "B", "title": ""})
    assert "grade B" in text
    assert "7500 for unknown, income unknown" in text
    assert "{" not in text


def test_slices_are_by_inputs_of_few_values(credit: Contract) -> None:
    gate = msgspec.structs.replace(credit.gate, slices=Slices(["grade", "employment_length"]))
    sliced = msgspec.structs.replace(credit, gate=gate)
    assert sliced.slices_of({"grade": "C", "employment_length": None}) == ("grade=C", "employment_length=unknown")
    assert msgspec.structs.replace(credit, gate=Gate()).slices_of({"grade": "C"}) == ()
    [name, _] = sliced.slices_of({"grade": "a whole text, by mistake, that nobody wants to find in a ledger"})
    assert name == "grade=a whole text, by mistake, that nobody wa"
