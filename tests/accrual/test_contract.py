"""Contracts: what ships is valid; every error names line, field and fix; payload checks reject what they should."""

from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from accrual.contract import Contract, load_contract, load_contracts, parse_duration
from accrual.errors import ContractError, Rejected

SHIPPED = Path(__file__).parents[2] / "schemas" / "contracts"


@pytest.fixture
def credit() -> Contract:
    return load_contract(SHIPPED / "credit-risk.yaml")


@pytest.fixture
def support() -> Contract:
    return load_contract(SHIPPED / "support-intents.yaml")


def test_the_shipped_contracts_are_valid() -> None:
    assert set(load_contracts(SHIPPED)) == {"credit-risk", "support-intents"}


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
        ("late: revise", "lat: revise", "lat", "correct its spelling"),
        ("late: revise", "late: perhaps", "late", "Invalid enum value"),
        (
            "on_expiry: censored",
            "on_expiry: nothing",
            "on_expiry",
            "neither `censored` nor one of output.classes",
        ),
        ('template: "{text}"', 'template: "{txt}"', "training.template", "is not one of inputs"),
        ('template: "{text}"', 'template: "text"', "training.template", "names no input"),
        ("alpha: 0.05", "alpha: 5", "gate.alpha", "between 0 and 1"),
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


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    document = yaml.safe_load((SHIPPED / "support-intents.yaml").read_text())
    del document["horizon"]
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ContractError, match="missing required field `horizon`; add it"):
        load_contract(path)


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
