"""A contract's rules for rows as SQL over typed rows (`typed_views`)."""

from __future__ import annotations

from accrual.contract import Contract
from accrual.quality_rules import OUTCOME, Rule, Span, rule_tree
from consumers.expression_sql import expression_sql, quoted
from consumers.typed_views import identifier

_SHOWN = 60
_LONGEST = 18  # groups after the first: a card number written digit by digit

# What looks like personal data, in RE2. Each is a search in the text, between characters that would continue it.
_EMAIL = r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"
_PHONE = (
    r"(?:^|[^\w+.,-])(?:\+|00)[1-9](?:[ ./()-]{0,2}\d){7,13}(?:\D|$)|(?:^|\D)\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?:\D|$)"
)
# Runs of groups: what is in them may begin and end with any group, since other numbers may stand beside it.
_IBANS = r"\b[A-Z]{2}\d{2}[A-Z0-9]*(?: [A-Z0-9]+)*"
_CARDS = r"\d+(?:[ -]\d+)*"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_IPV4 = rf"(?:^|[^\d.])(?:{_OCTET}\.){{3}}{_OCTET}(?:[^\d.]|\.\D|\.?$)"
_HEX = "[0-9a-f]{1,4}"
_IPV6 = rf"(?i)(?:^|[^\w:])(?:(?:{_HEX}:){{7}}|(?:{_HEX}:){{1,6}}(?::{_HEX}){{0,5}}:){_HEX}(?:[^\w:]|$)"
# Of no script or of all: the micro sign, accents that combine.
_ANY_SCRIPT = r"\p{Common}\p{Inherited}"
_SSN = r"(?:^|[^\d-])\d{3}-\d{2}-\d{4}(?:[^\d-]|$)"


def violations_sql(contract: Contract, rule: Rule, rows: str) -> str:
    """A query for the rows (of the typed relation `rows`) that break a rule: prediction_id, revision, rule, detail."""
    broken, detail = _broken(contract, rule)
    return f"select prediction_id, revision, {quoted(rule.name)} as rule, {detail} as detail from {rows} where {broken}"


def column_of(field: str) -> str:
    """The column of typed rows that a rule's field is."""
    if field.startswith(OUTCOME):
        return f'"values".{identifier(field.removeprefix(OUTCOME))}'
    return f"inputs.{identifier(field)}"


def _broken(contract: Contract, rule: Rule) -> tuple[str, str]:
    """Whether a row breaks the rule, and what to say of it. Personal data is named by its kind, and not shown."""
    if rule.expression is not None:
        return f"not ({_expression(contract, rule)})", quoted(f"not: {rule.expression}")
    field = rule.field or ""
    column = column_of(field)
    shown = f"{quoted(f'{field} is ')} || left({column}::varchar, {_SHOWN})"
    if rule.range is not None:
        return f"not ({_within(column, rule.range)})", f"{shown} || {quoted(f', not {_said(rule.range)}')}"
    if rule.length is not None:
        length = f"length({column})"
        said = quoted(f" characters, not {_said(rule.length)}")
        return f"not ({_within(length, rule.length)})", f"{quoted(f'{field} has ')} || {length} || {said}"
    if rule.categories is not None:
        known = ", ".join(quoted(category) for category in rule.categories)
        return f"{column} not in ({known})", f"{shown} || ', which is none of the categories'"
    if rule.matches is not None:
        return (
            f"not regexp_full_match({column}, {quoted(rule.matches)})",
            f"{shown} || {quoted(f', which is not {rule.matches}')}",
        )
    if rule.scripts is not None:
        own = "".join(rf"\p{{{name}}}" for name in rule.scripts)
        foreign = rf"[^\P{{L}}{_ANY_SCRIPT}{own}]"  # a letter, and not of them
        said = quoted(f", with letters that are not {', '.join(rule.scripts)}")
        return f"regexp_matches({column}, {quoted(foreign)})", f"{shown} || {said}"
    kinds = _personal(column)
    return f"len({kinds}) > 0", f"{quoted(f'{field} seems to hold: ')} || array_to_string({kinds}, ', ')"


def _expression(contract: Contract, rule: Rule) -> str:
    tree = rule_tree(rule, contract.input_types, contract.field_types)

    def column(name: str) -> str:
        of_outcome = name not in contract.inputs
        return f"({column_of(OUTCOME + name.removeprefix('values_') if of_outcome else name)})::varchar"

    return expression_sql(tree, column)


def _within(value: str, span: Span) -> str:
    ends = [f"{value} >= {span.least!r}"] if span.least is not None else []
    ends += [f"{value} <= {span.most!r}"] if span.most is not None else []
    return " and ".join(ends)


def _said(span: Span) -> str:
    ends = [f"at least {span.least:g}"] if span.least is not None else []
    return " and ".join(ends + ([f"at most {span.most:g}"] if span.most is not None else []))


def _personal(text: str) -> str:
    """A list of the kinds of personal data that a text seems to hold."""
    found = {
        "e-mail address": f"regexp_matches({text}, {quoted(_EMAIL)})",
        "phone number": f"regexp_matches({text}, {quoted(_PHONE)})",
        "IBAN": f"len(list_filter({_groups(text, _IBANS)}, lambda n: {_is_iban('n')})) > 0",
        "card number": f"len(list_filter({_groups(text, _CARDS)}, lambda n: {_is_card('n')})) > 0",
        "IP address": f"regexp_matches({text}, {quoted(_IPV4)}) or regexp_matches({text}, {quoted(_IPV6)})",
        "social security number": f"regexp_matches({text}, {quoted(_SSN)})",
    }
    kinds = ", ".join(f"case when {condition} then {quoted(kind)} end" for kind, condition in found.items())
    return f"list_filter([{kinds}], lambda kind: kind is not null)"


def _groups(text: str, runs: str) -> str:
    """A list of what consecutive groups of every run spell, without what is between them."""
    ends = f"range(i, least(len(g), i + {_LONGEST}) + 1)"
    from_one = f"lambda i: list_transform({ends}, lambda j: array_to_string(list_slice(g, i, j), ''))"
    of_run = f"lambda g: flatten(list_transform(range(1, len(g) + 1), {from_one}))"
    groups = (
        f"list_transform(regexp_extract_all({text}, {quoted(runs)}), lambda run: regexp_split_to_array(run, '[ -]'))"
    )
    return f"flatten(list_transform({groups}, {of_run}))"


def _is_card(number: str) -> str:
    """ISO/IEC 7812: from the right every second digit is doubled (9 taken off above 9); the sum ends in 0 (Luhn)."""
    doubled = "case when i % 2 = 0 then (2 * d::int) % 10 + (2 * d::int) // 10 else d::int end"
    digits = f"list_reverse(string_split({number}, ''))"
    is_long = f"length({number}) between 13 and 19"
    return (
        f"case when {is_long} then list_sum(list_transform({digits}, lambda d, i: {doubled})) % 10 = 0 else false end"
    )


def _is_iban(number: str) -> str:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, the number is 1 modulo 97."""
    digits = (
        f"list_transform(string_split(substr({number}, 5) || left({number}, 4), ''),"
        " lambda c: case when ascii(c) >= 65 then (ascii(c) - 55)::varchar else c end)"
    )
    # Digit by digit, since the number has more than thirty.
    each = f"list_transform(string_split(array_to_string({digits}, ''), ''), lambda d: d::bigint)"
    is_one = f"regexp_full_match({number}, '[A-Z]{{2}}[0-9]{{2}}[A-Z0-9]{{11,30}}')"
    return f"case when {is_one} then list_reduce({each}, lambda so_far, d: (so_far * 10 + d) % 97) = 1 else false end"
