"""A row rule of the contract as SQL, and made-up values that break it: canaries."""

from __future__ import annotations

import random
from collections.abc import Callable

from accrual.contract import Contract
from accrual.expression import parse
from accrual.quality_rules import Pattern, Rule
from consumers.expression_sql import expression_sql, quoted

# What personal data looks like, for RE2. A card number must also have Luhn's check digit (ISO/IEC 7812-1).
_PATTERNS: dict[Pattern, str] = {
    "email": r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}",
    "phone": r"(^|[^0-9A-Za-z])(\+|00)[0-9]{1,3}[ .()/-]?([0-9][ .()/-]{0,2}){6,12}($|[^0-9A-Za-z])",
    "iban": r"(^|[^0-9A-Za-z])[A-Z]{2}[0-9]{2} ?([A-Z0-9]{4} ?){2,7}[A-Z0-9]{1,4}($|[^0-9A-Za-z])",
    "card": r"(^|[^0-9])([0-9][ -]?){12,18}[0-9]($|[^0-9])",
    "ip": r"(^|[^0-9.])(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])(\.(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])){3}($|[^0-9.])",
}
_LUHN = (
    "list_sum(list_transform(list_reverse(string_split(digits, '')), lambda digit, i:"
    " case when i % 2 = 1 then digit::integer else digit::integer * 2 - if(digit::integer > 4, 9, 0) end)) % 10 = 0"
)


def is_broken(rule: Rule, contract: Contract, column_of: Callable[[str], str]) -> str:
    """SQL for whether a row breaks the rule; `column_of` gives SQL for an input's value, of its own type."""
    if rule.check is not None:
        kinds = {name: field.type for name, field in contract.inputs.items()}
        tree = parse(rule.check, kinds)
        return f"coalesce(not {expression_sql(tree, lambda name: f'({column_of(name)})::varchar')}, false)"
    value = column_of(rule.field or "")
    if rule.range is not None:
        return f"coalesce({value} < {rule.range[0]!r} or {value} > {rule.range[1]!r} or isnan({value}), false)"
    if rule.one_of is not None:
        return f"coalesce({value} not in ({', '.join(map(quoted, rule.one_of))}), false)"
    if rule.length is not None:
        return f"coalesce(length({value}) not between {rule.length[0]} and {rule.length[1]}, false)"
    if rule.matches is not None:
        return f"coalesce(not regexp_full_match({value}, {quoted(rule.matches)}), false)"
    return f"coalesce({' or '.join(_contains(value, pattern) for pattern in rule.free_of or [])}, false)"


def canaries(rule: Rule, chance: random.Random, count: int) -> list[str | float]:
    """Values of the rule's field that break it; none for a `check`, which says nothing of one value alone."""
    return [value for _ in range(count) for value in _canary(rule, chance)]


def _contains(value: str, pattern: Pattern) -> str:
    found = f"regexp_matches({value}, {quoted(_PATTERNS[pattern])})"
    if pattern != "card":
        return found
    # Every run of digits in question: it is one without what groups them.
    runs = f"regexp_extract_all({value}, '([0-9][ -]?){{12,18}}[0-9]')"
    digits = f"list_transform({runs}, lambda run: regexp_replace(run, '[ -]', '', 'g'))"
    return f"({found} and len(list_filter({digits}, lambda digits: {_LUHN})) > 0)"


def _canary(rule: Rule, chance: random.Random) -> list[str | float]:
    if rule.range is not None:
        low, high = rule.range
        beyond = (high - low or 1) * chance.uniform(0.001, 3)
        return [chance.choice([low - beyond, high + beyond])]
    if rule.one_of is not None:
        return [chance.choice(rule.one_of) + chance.choice(["?", "x", " "])]
    if rule.length is not None:
        too_long = "x" * (rule.length[1] + chance.randint(1, 50))
        return [chance.choice([too_long, "x" * (rule.length[0] - 1)]) if rule.length[0] > 0 else too_long]
    if rule.matches is not None:
        return ["\x00" + chance.choice("abc#")]
    return [f"Please note {_personal(pattern, chance)}, thank you" for pattern in rule.free_of or []]


def _personal(pattern: Pattern, chance: random.Random) -> str:
    """Made-up personal data, written in one of the ways in which people write it."""

    def digits(n: int) -> str:
        return "".join(chance.choices("0123456789", k=n))

    match pattern:
        case "email":
            return f"{chance.choice(['jo', 'a.b', 'x_y+z'])}{digits(2)}@{chance.choice(['mail.example', 'ex-1.co.uk'])}"
        case "phone":
            gap = chance.choice(["", " ", "-", "."])
            return gap.join(
                [chance.choice(["+", "00"]) + chance.choice(["1", "44", "420"]), *(digits(3) for _ in range(3))]
            )
        case "iban":
            gap = chance.choice(["", " "])
            return gap.join([chance.choice(["DE", "GB"]) + digits(2), *(digits(4) for _ in range(4)), digits(2)])
        case "card":
            body = chance.choice("45") + digits(14)
            doubled = [int(d) * 2 - (9 if int(d) > 4 else 0) if i % 2 == 0 else int(d) for i, d in enumerate(body)]
            number = body + str(-sum(doubled) % 10)
            return chance.choice(["", " ", "-"]).join(number[i : i + 4] for i in range(0, 16, 4))
        case "ip":
            return ".".join(str(chance.randint(0, 255)) for _ in range(4))
