"""The label's expression a second time: its tree as DuckDB SQL, for the audit.

Every operand appears once in the SQL, so that it is no longer than a few times the expression: where a result must be
looked at twice it is bound to a name by `list_transform([result], lambda ...)`.
"""

from __future__ import annotations

from collections.abc import Callable

from accrual.expression import LARGEST_WHOLE, Node

_TYPES = {"string": "varchar", "number": "double", "integer": "double", "boolean": "boolean", "null": "varchar"}
_LETTERS = "'ABCDEFGHIJKLMNOPQRSTUVWXYZ', 'abcdefghijklmnopqrstuvwxyz'"


def expression_sql(node: Node, column_of: Callable[[str], str]) -> str:
    """SQL for the value: varchar, double or boolean. `column_of` gives SQL for a field's text in the event's JSON."""
    parts = [expression_sql(operand, column_of) for operand in node.operands]
    match node.op:
        case "constant":
            return _constant(node)
        case "field":
            return _field(node.type, column_of(str(node.value)))
        case "if":
            return f"case when {parts[0]} then {parts[1]} else {parts[2]} end"
        case "is null":
            return f"({parts[0]} is null)"
        case "and" | "or":
            return f"({f' {node.op} '.join(parts)})"
        case "not":
            return f"(not {parts[0]})"
        case "in":
            return f"({parts[0]} in ({', '.join(parts[1:])}))"
        case "==" | "!=" | "<" | "<=" | ">" | ">=":
            return f"({parts[0]} {'=' if node.op == '==' else node.op} {parts[1]})"
        case "+" | "-" | "*" | "/":
            return _finite(f"{parts[0]} {node.op} {parts[1]}")
        case "min" | "max":
            # DuckDB's least and greatest pass over nulls; ours are null when an operand is.
            chosen = f"case when list_count(v) = len(v) then list_{node.op}(v) end"
            return f"list_transform([[{', '.join(parts)}]], lambda v: {chosen})[1]"
        case "negative":
            return f"(-{parts[0]})"
        case "lower":
            return f"translate({parts[0]}, {_LETTERS})"
        case "length":
            return f"length({parts[0]})::double"
        case _:
            return f"{node.op}({', '.join(parts)})"


def label_sql(node: Node, column_of: Callable[[str], str]) -> str:
    """SQL for the expression's value written as a label."""
    value = expression_sql(node, column_of)
    match node.type:
        case "boolean":
            return f"case {value} when true then 'True' when false then 'False' end"
        case "integer":
            exact = f"case when abs(v) <= {LARGEST_WHOLE} then v::hugeint end"
            return f"list_transform([{value}], lambda v: {exact})[1]::varchar"
        case "number":
            return f"({value} + 0.0)::varchar"
    return value


def quoted(text: str) -> str:
    """A text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def _constant(node: Node) -> str:
    if node.value is None:
        return "null"
    if isinstance(node.value, str):
        return quoted(node.value)
    return f"{quoted(repr(node.value))}::{_TYPES[node.type]}"


def _field(kind: str, text: str) -> str:
    if kind == "string":
        return text
    return _finite(f"try_cast({text} as double)") if kind in ("number", "integer") else f"try_cast({text} as boolean)"


def _finite(number: str) -> str:
    return f"list_transform([{number}], lambda v: case when isfinite(v) then v end)[1]"
