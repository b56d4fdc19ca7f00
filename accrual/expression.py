"""The expression language of `label.expression`: pure, typed, and small enough to be computed twice.

    'lost' if status == 'Charged Off' or coalesce(days_past_due, 0) >= 90 else 'paid'

It is written like Python and read by Python's own parser, but only what is listed here is let through, and nothing is
ever executed as Python: `parse` makes a tree of `Node`s whose types are known, and `evaluator` makes closures of it.
(The audit translates the same tree to SQL: `consumers/expression_sql.py`.)

- values: the fields of the outcome, texts, numbers, `True`, `False`, `None`
- `== != < <= > >=`, `in [...]`, `is None`, `and`, `or`, `not`, `+ - * /`, `x if condition else y`
- `min`, `max`, `abs`, `round` (half away from zero), `lower` (A to Z only), `length` (in characters), `coalesce`

Null is SQL's: an absent field is null, what is computed from null is null (also `null == null`), `and`, `or` and `not`
know three truth values, and an `if` whose condition is null takes its `else`. Numbers are 64-bit floats; a division by
zero and a result beyond their range are null.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from accrual.errors import ContractError

MAX_LENGTH = 2000
MAX_DEPTH = 40
LARGEST_WHOLE = 2**53
"""Whole numbers beyond this are not exact as 64-bit floats."""

Value = str | float | bool | None
Evaluator = Callable[[Mapping[str, Any]], Value]


class Node(msgspec.Struct, frozen=True):
    """One step of an expression.

    `op` is an operator or function as it is written, or one of `constant` (`value` is it), `field` (`value` is its
    name), `if` (condition, then, else), `is null`, `negative`. `type` is string, number, integer (a number that is
    whole), boolean, or null.
    """

    op: str
    type: str
    operands: tuple[Node, ...] = ()
    value: Value = None


def parse(text: str, fields: Mapping[str, str]) -> Node:
    """The tree of an expression over `fields` (name → type). Raises ContractError with position and problem."""
    if len(text) > MAX_LENGTH:
        raise ContractError(f"the expression has {len(text)} characters; at most {MAX_LENGTH} are allowed")
    source = text.replace("\n", " ").strip()
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError as exc:
        raise ContractError(f"at column {exc.offset or len(source) + 1}: {exc.msg}") from exc
    except (ValueError, RecursionError, MemoryError) as exc:
        raise ContractError(f"the expression cannot be read: {str(exc) or 'it nests too deep'}") from exc
    return _Reader(source, fields).read(tree.body, 1)


def outcomes_of(node: Node) -> list[Node]:
    """The nodes of which one gives the result: through every `if` and `coalesce`."""
    if node.op == "if":
        return outcomes_of(node.operands[1]) + outcomes_of(node.operands[2])
    if node.op == "coalesce":
        return [outcome for operand in node.operands for outcome in outcomes_of(operand)]
    return [node]


def evaluator(node: Node) -> Evaluator:
    """A function from an outcome's checked values to what the expression is for them. It raises nothing."""
    parts = [evaluator(operand) for operand in node.operands]
    match node.op:
        case "constant":
            constant = node.value
            return lambda _: constant
        case "field":
            return _field(str(node.value), node.type)
        case "if":
            condition, then, otherwise = parts
            return lambda values: then(values) if condition(values) else otherwise(values)
        case "is null":
            [part] = parts
            return lambda values: part(values) is None
        case "and":
            return lambda values: _all(parts, values)
        case "or":
            return lambda values: _any(parts, values)
        case "coalesce":
            return lambda values: next((found for part in parts if (found := part(values)) is not None), None)
    return _strict(_FUNCTIONS[node.op], parts)


def label_text(value: Value, kind: str) -> str | None:
    """How a label is written: text as it is, a boolean `True` or `False`, whole numbers without a point.

    None for null, and for a whole number that is too large to be exact.
    """
    if value is None or isinstance(value, str):
        return value
    if kind == "integer":
        return str(int(value)) if abs(value) <= LARGEST_WHOLE else None
    return str(value) if kind == "boolean" else str(value + 0.0)  # which makes -0.0 positive


def half_away(number: float) -> float:
    """The nearest whole number; of two, the one farther from zero."""
    whole = float(math.trunc(number))
    return whole + math.copysign(1.0, number) if abs(number - whole) >= 0.5 else whole


class _Reader:
    """Turns Python's syntax tree into ours, or says why not."""

    def __init__(self, source: str, fields: Mapping[str, str]) -> None:
        self._source = source
        self._fields = fields

    def read(self, tree: ast.expr, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._wrong(tree, f"it nests deeper than {MAX_DEPTH}")
        match tree:
            case ast.Constant(value=value):
                return self._constant(tree, value)
            case ast.Name(id=name):
                if name not in self._fields:
                    raise self._wrong(tree, f"'{name}' is not in outcome.values ({', '.join(self._fields)})")
                return Node("field", self._fields[name], value=name)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return Node("not", "boolean", (self._typed(operand, "boolean", depth),))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                negative = self._number("negative", [operand], depth)
                [number] = negative.operands
                if number.op == "constant" and isinstance(number.value, float):
                    return Node("constant", number.type, value=-number.value)
                return negative
            case ast.BoolOp(op=op, values=values):
                conditions = tuple(self._typed(value, "boolean", depth) for value in values)
                return Node("and" if isinstance(op, ast.And) else "or", "boolean", conditions)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._number(_ARITHMETIC[type(op)], [left, right], depth)
            case ast.Compare(ops=[op], left=left, comparators=[right]):
                return self._comparison(tree, op, left, right, depth)
            case ast.Compare():
                raise self._wrong(tree, "compare two at a time: `a < b and b < c`")
            case ast.IfExp(test=test, body=body, orelse=orelse):
                condition = self._typed(test, "boolean", depth)
                branches = [self.read(body, depth + 1), self.read(orelse, depth + 1)]
                return Node("if", self._shared_type(tree, branches), (condition, *branches))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
                return self._call(tree, name, args, depth)
        raise self._wrong(tree, "the language does not have this (docs/contract.md lists what it has)")

    def _constant(self, tree: ast.expr, value: Any) -> Node:
        match value:
            case None:
                return Node("constant", "null")
            case bool():
                return Node("constant", "boolean", value=value)
            case str() if not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
                return Node("constant", "string", value=value)
            case str():
                raise self._wrong(tree, "a text may hold neither NUL nor surrogates")
            case int() | float() if abs(value) <= LARGEST_WHOLE or (isinstance(value, float) and math.isfinite(value)):
                return Node("constant", "integer" if isinstance(value, int) else "number", value=float(value))
            case int() | float():
                raise self._wrong(tree, f"the number is too large; a whole one may go up to {LARGEST_WHOLE}")
        raise self._wrong(tree, "constants are texts, numbers, True, False and None")

    def _number(self, op: str, operands: list[ast.expr], depth: int) -> Node:
        read = tuple(self._typed(operand, "number", depth) for operand in operands)
        whole = op != "/" and all(node.type == "integer" for node in read)
        return Node(op, "integer" if whole or op == "round" else "number", read)

    def _comparison(self, tree: ast.expr, op: ast.cmpop, left: ast.expr, right: ast.expr, depth: int) -> Node:
        value = self.read(left, depth + 1)
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._wrong(tree, "`is` tests for None only; write ==")
            found = Node("is null", "boolean", (value,))
            return found if isinstance(op, ast.Is) else Node("not", "boolean", (found,))
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
                raise self._wrong(tree, "`in` takes a list of constants: x in ['a', 'b']")
            members = [self.read(element, depth + 1) for element in right.elts]
            if any(member.op != "constant" or member.type == "null" for member in members):
                raise self._wrong(right, "the list of `in` holds constants only, and not None")
            self._shared_type(tree, [value, *members])
            found = Node("in", "boolean", (value, *members))
            return found if isinstance(op, ast.In) else Node("not", "boolean", (found,))
        other = self.read(right, depth + 1)
        if "null" in (value.type, other.type):
            raise self._wrong(tree, "a comparison with None is never true; write `is None` or `is not None`")
        kind, sign = self._shared_type(tree, [value, other]), _COMPARISONS[type(op)]
        if kind == "boolean" and sign not in ("==", "!="):
            raise self._wrong(tree, f"{sign} takes numbers or texts, not booleans")
        return Node(sign, "boolean", (value, other))

    def _call(self, tree: ast.expr, name: str, args: list[ast.expr], depth: int) -> Node:
        least, most = _ARGUMENTS.get(name, (0, -1))
        if most < 0:
            raise self._wrong(tree, f"there is no function '{name}'; there are {', '.join(_ARGUMENTS)}")
        if not least <= len(args) <= most:
            raise self._wrong(tree, f"{name} takes {'one argument' if most == 1 else 'two or more arguments'}")
        if name == "coalesce":
            operands = [self.read(argument, depth + 1) for argument in args]
            return Node(name, self._shared_type(tree, operands), tuple(operands))
        if name in ("lower", "length"):
            kind = "string" if name == "lower" else "integer"
            return Node(name, kind, (self._typed(args[0], "string", depth),))
        return self._number(name, args, depth)

    def _typed(self, tree: ast.expr, wanted: str, depth: int) -> Node:
        node = self.read(tree, depth + 1)
        if node.type != wanted and not (wanted == "number" and node.type == "integer"):
            raise self._wrong(tree, f"a {wanted} is needed here, and this is {_A[node.type]}")
        return node

    def _shared_type(self, tree: ast.expr, nodes: list[Node]) -> str:
        kinds = {node.type for node in nodes} - {"null"}
        if kinds == {"integer", "number"}:
            return "number"
        if len(kinds) > 1:
            raise self._wrong(
                tree, f"this mixes {' and '.join(_A[kind] for kind in sorted(kinds))}; all must be the same"
            )
        return next(iter(kinds), "null")

    def _wrong(self, tree: ast.expr, problem: str) -> ContractError:
        column = len(self._source.encode()[: tree.col_offset].decode()) + 1
        part = ast.get_source_segment(self._source, tree) or ""
        return ContractError(f"at column {column}, `{part if len(part) <= 60 else part[:57] + '...'}`: {problem}")


def _field(name: str, kind: str) -> Evaluator:
    if kind not in ("number", "integer"):
        return lambda values: values.get(name)

    def number(values: Mapping[str, Any]) -> float | None:
        value = values.get(name)
        try:
            return None if value is None else float(value)
        except OverflowError:
            return None

    return number


def _all(parts: list[Evaluator], values: Mapping[str, Any]) -> bool | None:
    known: bool | None = True
    for part in parts:
        found = part(values)
        if found is False:
            return False
        if found is None:
            known = None
    return known


def _any(parts: list[Evaluator], values: Mapping[str, Any]) -> bool | None:
    known: bool | None = False
    for part in parts:
        found = part(values)
        if found is True:
            return True
        if found is None:
            known = None
    return known


def _strict(function: Callable[..., Value], parts: list[Evaluator]) -> Evaluator:
    """Null if any operand is, or if the result is no finite number."""

    def compute(values: Mapping[str, Any]) -> Value:
        operands = [part(values) for part in parts]
        if None in operands:
            return None
        result = function(*operands)
        return None if isinstance(result, float) and not math.isfinite(result) else result

    return compute


_ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
# Least and most arguments of each function.
_ARGUMENTS = {
    "min": (2, MAX_LENGTH),
    "max": (2, MAX_LENGTH),
    "abs": (1, 1),
    "round": (1, 1),
    "lower": (1, 1),
    "length": (1, 1),
    "coalesce": (2, MAX_LENGTH),
}
_A = {
    "string": "a string",
    "number": "a number",
    "integer": "a number",
    "boolean": "a boolean",
    "null": "None",
}
_LOWER = {capital: capital + 32 for capital in range(ord("A"), ord("Z") + 1)}
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "not": operator.not_,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, *members: value in members,
    "negative": operator.neg,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": lambda dividend, divisor: dividend / divisor if divisor else None,
    "min": min,
    "max": max,
    "abs": abs,
    "round": half_away,
    "lower": lambda text: text.translate(_LOWER),
    "length": lambda text: float(len(text)),
}
