"""The expression language: what it gives, what it refuses and with which words. SQL's side is in tests/consumers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual.errors import ContractError
from accrual.expression import MAX_DEPTH, MAX_LENGTH, Value, evaluator, label_text, parse

FIELDS = {"status": "string", "days": "integer", "amount": "number", "sure": "boolean"}


def value(text: str, **values: Any) -> Value:
    return evaluator(parse(text, FIELDS))(values)


def label(text: str, **values: Any) -> str | None:
    return label_text(value(text, **values), parse(text, FIELDS).type)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("days + 1", 6.0),
        ("days / 0", None),
        ("amount * 1e308 * 10", None),
        ("-days", -5.0),
        ("- 2 - -2", 0.0),
        ("min(days, amount, 7)", 2.5),
        ("max(days, None if sure else 1)", None),
        ("abs(-amount)", 2.5),
        ("round(amount)", 3.0),
        ("round(-amount)", -3.0),
        ("round(0.49999999999999994)", 0.0),
        ("lower(status)", "fully Äpaid"),
        ("length(status)", 11.0),
        ("status == 'FULLY ÄPAID' and days in [5, 6]", True),
        ("status not in ['a', \"it's\"]", True),
        ("status < 'a'", True),
        ("sure == True", True),
        ("'a' if days > 4 and not sure else 'b'", "b"),
        ("coalesce(None, status, 'x')", "FULLY ÄPAID"),
        ("days\n > 4", True),
    ],
)
def test_what_an_expression_gives(text: str, expected: Value) -> None:
    assert value(text, status="FULLY ÄPAID", days=5, amount=2.5, sure=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("days > 3", None),
        ("days == days", None),
        ("days != 3", None),
        ("days in [3]", None),
        ("not days > 3", None),
        ("days is None", True),
        ("days is not None", False),
        ("days > 3 and sure", None),
        ("sure and days > 3", None),
        ("days > 3 and not sure", False),
        ("days > 3 or sure", True),
        ("days > 3 or not sure", None),
        ("'a' if days > 3 else 'b'", "b"),
        ("'a' if not days > 3 else 'b'", "b"),
        ("days + 1", None),
        ("lower(status)", None),
        ("coalesce(days, 0) >= 0", True),
        ("coalesce(days, amount)", None),
    ],
)
def test_null_is_that_of_sql(text: str, expected: Value) -> None:
    found = value(text, sure=True, status=None)
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("status", "x"),
        ("sure", "True"),
        ("days", "5"),
        ("days * 2 - round(amount)", "7"),
        ("days / 5", "1.0"),
        ("amount", "2.5"),
        ("amount - amount", "0.0"),
        ("-(amount - amount)", "0.0"),
        ("amount * 1e30", "2.5e+30"),
        ("days * 9007199254740991", None),
        ("coalesce(days, amount)", "5.0"),
    ],
)
def test_how_a_label_is_written(text: str, expected: str | None) -> None:
    assert label(text, status="x", days=5, amount=2.5, sure=True) == expected


@pytest.mark.parametrize(
    ("text", "column", "problem"),
    [
        ("stauts == 'a'", 1, "'stauts' is not in outcome.values (status, days, amount, sure)"),
        ("'a' if days else 'b'", 8, "a boolean is needed here, and this is a number"),
        ("'ä' == status and status + 'x' == 'y'", 19, "a number is needed here, and this is a string"),
        ("status == 5", 1, "this mixes a number and a string; all must be the same"),
        ("'a' if sure else 5", 1, "mixes"),
        ("days in ['a']", 1, "mixes"),
        ("days in []", 1, "takes a list of constants"),
        ("days in days", 1, "takes a list of constants"),
        ("days in [amount]", 9, "constants only"),
        ("days == None", 1, "write `is None`"),
        ("days is 5", 1, "`is` tests for None only"),
        ("0 < days < 5", 1, "compare two at a time"),
        ("sure < True", 1, "not booleans"),
        ("not days", 5, "a boolean is needed here"),
        ("len(status)", 1, "there is no function 'len'; there are min, max"),
        ("lower(status, 'x')", 1, "lower takes one argument"),
        ("min(days)", 1, "min takes two or more arguments"),
        ("lower(x=status)", 1, "does not have this"),
        ("__import__('os').system('true')", 1, "does not have this"),
        ("status.upper()", 1, "does not have this"),
        ("[x for x in status]", 1, "does not have this"),
        ("(lambda: 1)()", 1, "does not have this"),
        ("f'{status}'", 1, "does not have this"),
        ("days ** 9", 1, "does not have this"),
        ("days % 2", 1, "does not have this"),
        ("status[0]", 1, "does not have this"),
        ("(x := days)", 2, "does not have this"),
        ("b'x'", 1, "constants are texts"),
        ("1j", 1, "constants are texts"),
        ("1e999", 1, "too large"),
        ("days == 9007199254740993", 9, "too large"),
        ("'\\0'", 1, "neither NUL nor surrogates"),
        ("'\\ud800'", 1, "neither NUL nor surrogates"),
        ("days +", 7, "invalid syntax"),
        ("days; days", 5, "invalid syntax"),
        ("import os", 1, "invalid syntax"),
        ("", 1, "invalid syntax"),
    ],
)
def test_what_is_refused_names_column_and_problem(text: str, column: int, problem: str) -> None:
    with pytest.raises(ContractError) as error:
        parse(text, FIELDS)
    assert f"at column {column}" in str(error.value)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "1 + " * (MAX_LENGTH // 4) + "1",
        "not " * (MAX_LENGTH // 4 - 1) + "sure",
        "-" * (MAX_LENGTH - 10) + "days",
        "(" * 900 + "days" + ")" * 900,
        "9" * (MAX_LENGTH - 10),
        "abs(" * MAX_DEPTH + "days" + ")" * MAX_DEPTH,
        "days\0",
        "x" * (MAX_LENGTH + 1),
    ],
)
def test_what_is_too_big_or_no_text_is_an_error_too(text: str) -> None:
    with warnings.catch_warnings(), pytest.raises(ContractError):
        warnings.simplefilter("ignore")
        parse(text, FIELDS)


@given(st.text(st.sampled_from("days status'\"()[]+-*/<>=!,.:0123456789enotridfls\n\t#\\{}@"), max_size=30))
def test_any_text_is_an_expression_or_a_contract_error(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = parse(text, FIELDS)
        except ContractError:
            return
    evaluator(tree)({})
