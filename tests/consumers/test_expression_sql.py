"""The two computations of an expression agree: closures in Python, SQL in DuckDB."""

from __future__ import annotations

import json
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accrual.expression import Value, evaluator, label_text, parse
from consumers.expression_sql import expression_sql, label_sql

FIELDS = {"text": "string", "other": "string", "amount": "number", "count": "integer", "flag": "boolean"}
COLUMNS = {name: f"json_extract_string(event, '$.{name}')" for name in FIELDS}
NUMBERS = [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, 3.0, 0.1, 1e16, 1e-5, 1e200, -1e300, 5e-324, 0.49999999999999994, 2.0**53]
INTEGERS = [0, 1, -7, 2**53, 2**53 + 1, 2**70, 10**400]
TEXTS = ["", "a", "A", "Az", "ÄÖ", "it's", 'say "x"', "\\", "🤦🏼", "e\u0301", "İ", "z\u0000z", "\uffff", "\U0001f600"]

numbers = st.sampled_from(NUMBERS) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.sampled_from(TEXTS) | st.text(max_size=5)
values = st.fixed_dictionaries(
    {},
    optional={
        "text": texts | st.none(),
        "other": texts | st.none(),
        "amount": numbers | st.none(),
        "count": st.sampled_from(INTEGERS) | st.integers(-1000, 1000) | st.none(),
        "flag": st.booleans() | st.none(),
    },
)
LEAVES = {
    "number": ["amount", "count", "0", "1", "-7", "2.5", "1e300"],
    "text": ["text", "other", *(repr(text) for text in TEXTS if "\0" not in text)],
    "flag": ["flag", "flag", "True", "False"],
}
# What may be made of parts: # stands for a number, $ for a text, ? for a flag.
FORMS = {
    "number": [
        *("(# + #)", "(# - #)", "(# * #)", "(# / #)", "-(#)", "min(#, #)", "max(#, #, #)", "abs(#)", "round(#)"),
        *("length($)", "coalesce(#, #)", "(# if ? else #)", "(# if ? else None)"),
    ],
    "text": ["lower($)", "coalesce($, $)", "($ if ? else $)", "(None if ? else $)"],
    "flag": [
        *("(# < #)", "(# <= #)", "(# > #)", "(# >= #)", "(# == #)", "(# != #)", "(# == 1)", "(# in [1, -7, 0.5])"),
        *("($ < $)", "($ <= $)", "($ > $)", "($ >= $)", "($ == $)", "($ != $)", "($ not in ['a', 'İ', \"it's\"])"),
        *("(? and ?)", "(? or ?)", "(? and ? and ?)", "(not ?)", "(? == ?)", "(? != ?)", "(? if ? else ?)"),
        *("(# is None)", "($ is not None)", "(? is None)"),
    ],
}


@st.composite
def expressions(draw: st.DrawFn, kind: str | None = None, depth: int = 4) -> str:
    """The text of an expression."""
    of = kind or draw(st.sampled_from(sorted(FORMS)))
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(LEAVES[of]))
    form = draw(st.sampled_from(FORMS[of]))
    parts = {"#": "number", "$": "text", "?": "flag"}
    return "".join(draw(expressions(parts[sign], depth - 1)) if sign in parts else sign for sign in form)


@pytest.fixture(scope="module")
def engine() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


def both_in_sql(engine: duckdb.DuckDBPyConnection, text: str, outcome: dict[str, Any]) -> tuple[Value, str | None]:
    tree = parse(text, FIELDS)
    said = [function(tree, COLUMNS.__getitem__) for function in (expression_sql, label_sql)]
    rows = engine.from_arrow(pa.table({"event": [json.dumps(outcome)]})).project(", ".join(said)).fetchall()
    found: tuple[Value, str | None] = rows[0]
    return found


@settings(max_examples=500, deadline=None)
@given(expressions(), values)
@example("lower(text)", {"text": "AZ ÄÖ İ Σ"})
@example("round(amount) + round(-amount / 3)", {"amount": 7.5})
@example("length(text)", {"text": "🤦🏼 e\u0301"})
def test_python_and_sql_agree(engine: duckdb.DuckDBPyConnection, text: str, outcome: dict[str, Any]) -> None:
    tree = parse(text, FIELDS)
    expected = evaluator(tree)(outcome)
    assert both_in_sql(engine, text, outcome) == (expected, label_text(expected, tree.type))


def test_the_sql_of_a_deep_expression_stays_short(engine: duckdb.DuckDBPyConnection) -> None:
    text = "amount"
    for _ in range(9):
        text = f"round(min(1 / (1 + {text}), 2))"
    assert len(expression_sql(parse(text, FIELDS), COLUMNS.__getitem__)) < 100 * len(text)
    assert both_in_sql(engine, text, {"amount": 3.0})[0] == evaluator(parse(text, FIELDS))({"amount": 3.0})
