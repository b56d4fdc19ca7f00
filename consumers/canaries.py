"""Canaries: rows of a window, each made to break one rule, to see whether the rule finds them.

A rule that finds all rows that break it, in data that has none, looks the same as one that finds nothing: so the
breaking is done here, by other code than the rule's SQL, and the rule's recall is measured.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from accrual.contract import Contract
from accrual.expression import Node, evaluator
from accrual.quality_rules import OUTCOME, Canaries, Rule, rule_tree

_ATTEMPTS = 200
_WORDS = {"Cyrillic": "привет", "Greek": "καλημέρα", "Han": "你好", "Hebrew": "שלום", "Latin": "hello"}  # by script
Fields = dict[str, Any]


class Canary(msgspec.Struct, frozen=True):
    """A row that breaks `rule`: inputs and outcome values as JSON."""

    rule: str
    inputs: str
    values: str


def hatch(contract: Contract, settings: Canaries, rows: Sequence[Mapping[str, Any]]) -> list[Canary]:
    """Canaries for every rule that something can be found to break. `rows` hold decoded `inputs` and `values`.

    The same for the same rows, contract and seed.
    """
    found = []
    for rule in (contract.quality.rules if contract.quality else []) if rows else []:
        chance = random.Random(f"{settings.seed}|{rule.name}")
        for _ in range(settings.rows):
            row = chance.choice(rows)
            inputs, values = dict(row["inputs"]), dict(row["values"] or {})
            if _break(contract, rule, inputs, values, rows, chance):
                found.append(
                    Canary(rule.name, msgspec.json.encode(inputs).decode(), msgspec.json.encode(values).decode())
                )
    return found


def _break(
    contract: Contract,
    rule: Rule,
    inputs: Fields,
    values: Fields,
    rows: Sequence[Mapping[str, Any]],
    chance: random.Random,
) -> bool:
    """Change one row so that it breaks the rule; whether that could be done."""
    if rule.expression is not None:
        return _break_expression(contract, rule, inputs, values, rows, chance)
    field = rule.field or ""
    fields, name = (values, field.removeprefix(OUTCOME)) if field.startswith(OUTCOME) else (inputs, field)
    whole = contract.input_types.get(name) == "integer" if fields is inputs else contract.field_types[name] == "integer"
    broken = next(_BREAK[rule.kind](rule, fields.get(name), whole, chance), None)
    if broken is None:
        return False
    fields[name] = broken
    return True


def _out_of_range(rule: Rule, _: Any, whole: bool, chance: random.Random) -> Iterator[float]:
    ends = rule.range
    assert ends is not None
    away = chance.choice([1, 10, 1000]) if whole else chance.choice([0.001, 1.0, 1000.0])
    choices = [ends.least - away] if ends.least is not None else []
    choices += [ends.most + away] if ends.most is not None else []
    chosen = chance.choice(choices)
    yield int(chosen) if whole else chosen


def _no_category(rule: Rule, value: Any, _: bool, chance: random.Random) -> Iterator[str]:
    text = value or chance.choice(rule.categories or ["x"])
    others = [text + "x", text.lower(), text.swapcase(), f" {text}", text[:-1], ""]
    chance.shuffle(others)
    yield from (other for other in others if other not in (rule.categories or []))


def _no_match(rule: Rule, value: Any, _: bool, chance: random.Random) -> Iterator[str]:
    text = value or "x"
    others = [text + text, text[::-1], text[:-1], "", text + "\n", "\u2603", text.swapcase(), f" {text}"]
    chance.shuffle(others)
    try:
        pattern = re.compile(rule.matches or "")
    except re.error:  # RE2 knows classes that Python does not
        return iter(())
    return (other for other in others if not pattern.fullmatch(other))


def _wrong_length(rule: Rule, value: Any, _: bool, chance: random.Random) -> Iterator[str]:
    ends = rule.length
    assert ends is not None
    lengths = [int(ends.least) - 1] if ends.least is not None and ends.least >= 1 else []
    lengths += [int(ends.most) + chance.choice([1, 100])] if ends.most is not None else []
    chance.shuffle(lengths)
    text = value or "x"
    yield from ((text * (length // len(text) + 1))[:length] for length in lengths)


def _in_another_script(rule: Rule, value: Any, _: bool, chance: random.Random) -> Iterator[str]:
    others = [word for script, word in _WORDS.items() if script not in (rule.scripts or [])]
    words = str(value or "").split()
    if others:
        words.insert(chance.randint(0, len(words)), chance.choice(others))
        yield " ".join(words)


def _with_personal_data(_: Rule, value: Any, __: bool, chance: random.Random) -> Iterator[str]:
    digits = [chance.randrange(10) for _ in range(20)]
    number = "".join(map(str, digits))
    secret = chance.choice(
        [
            f"jane.doe{number[:3]}@mail.example.org",
            f"+44 20 7{number[:3]} {number[3:7]}",
            f"({2 + digits[0] % 8}{number[1:3]}) {number[3:6]}-{number[6:10]}",
            _iban("DE", number[:18]),
            " ".join(re.findall("....", _card("4" + number[:14]))),
            _card("5" + number[:14]),
            f"10.{digits[0]}.{digits[1]}.{digits[2]}",
            "2001:db8:85a3:0:0:8a2e:370:7334",
            f"{number[:3]}-{number[3:5]}-{number[5:9]}",
        ]
    )
    words = str(value or "").split()
    words.insert(chance.randint(0, len(words)), secret)
    yield " ".join(words)


def _card(number: str) -> str:
    """With Luhn's check digit (ISO/IEC 7812)."""
    doubled = [int(d) if n % 2 else sum(divmod(2 * int(d), 10)) for n, d in enumerate(reversed(number))]
    return number + str(-sum(doubled) % 10)


def _iban(country: str, account: str) -> str:
    """With its check digits (ISO 13616)."""
    letters = "".join(str(ord(letter) - 55) for letter in country)
    return f"{country}{98 - int(f'{account}{letters}00') % 97:02d}{account}"


def _break_expression(
    contract: Contract,
    rule: Rule,
    inputs: Fields,
    values: Fields,
    rows: Sequence[Mapping[str, Any]],
    chance: random.Random,
) -> bool:
    """Try values of other rows, constants of the expression and what is beside them until it is false."""
    tree = rule_tree(rule, contract.input_types, contract.field_types)
    says = evaluator(tree)
    names, constants = sorted(_named(tree, "field")), sorted(_named(tree, "constant"), key=str)
    for _ in range(_ATTEMPTS):
        tried, tried_values = dict(inputs), dict(values)
        for name in chance.sample(names, chance.randint(1, len(names))):
            fields, own = (tried, name) if name in contract.inputs else (tried_values, name.removeprefix("values_"))
            kind = contract.input_types[name] if fields is tried else contract.field_types[own]
            other = chance.choice(rows)["inputs" if fields is tried else "values"] or {}
            fields[own] = _other_value(kind, other.get(own), constants, chance)
        if says({**{f"values_{name}": value for name, value in tried_values.items()}, **tried}) is False:
            inputs.update(tried)
            values.update(tried_values)
            return True
    return False


def _other_value(kind: str, of_another: Any, constants: Sequence[Any], chance: random.Random) -> Any:
    if kind == "boolean":
        return chance.random() < 0.5
    if kind == "string":
        return chance.choice([of_another or "", "", "x", *(c for c in constants if isinstance(c, str))])
    numbers = [c for c in constants if isinstance(c, float) and not isinstance(c, bool)]
    near = [of_another or 0, 0, -1, *(c + step for c in numbers for step in (-1, 0, 1))]
    number = chance.choice(near) * chance.choice([1, 1, 2, 100, -1])
    return int(number) if kind == "integer" else float(number)


def _named(node: Node, op: str) -> set[Any]:
    own = {node.value} if node.op == op and node.value is not None else set()
    return own.union(*(_named(operand, op) for operand in node.operands))


_BREAK: dict[str, Callable[[Rule, Any, bool, random.Random], Iterator[Any]]] = {
    "range": _out_of_range,
    "categories": _no_category,
    "matches": _no_match,
    "length": _wrong_length,
    "scripts": _in_another_script,
    "pii": _with_personal_data,
}
