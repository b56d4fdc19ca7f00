"""The contract's rules for the quality of ground truth: how they are written, and what makes no sense.

What they mean is in docs/quality.md; the sink carries them out when a window is to be sealed (`consumers/quality.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec

from accrual.errors import ContractError
from accrual.expression import parse

Pattern = Literal["email", "phone", "iban", "card", "ip"]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every row must satisfy: one of the conditions on `field`, or `check`, an expression over all inputs.

    `field` is an input, or `values.NAME` of the outcome. A row that breaks the rule is quarantined, or only counted
    when it is there to `warn`. A missing value satisfies every condition. `range` and `length` (in characters) include
    both bounds; `matches` is a regular expression for the whole text; `free_of` names kinds of personal data that a
    text must not contain.
    """

    name: str
    field: str | None = None
    range: tuple[float, float] | None = None
    one_of: list[str] | None = None
    length: tuple[int, int] | None = None
    matches: str | None = None
    free_of: list[Pattern] | None = None
    check: str | None = None
    warn: bool = False

    @property
    def conditions(self) -> list[str]:
        """The names of the conditions that are given."""
        names = ("range", "one_of", "length", "matches", "free_of", "check")
        return [name for name in names if getattr(self, name) is not None]


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a window must satisfy to be sealed; a bound that is not given does not hold anything back.

    Shares are of the window's rows: `quarantined`, `largest_label`, `near_duplicates`, `conflicts`, `suspects`.
    `label_drift`, `input_drift`: the population stability index against the last sealed window. `slice_ratio`: for
    every value of the `slices`, its share among labeled rows over its share among all predictions, at least.
    `canary_recall`: of planted bad rows, the share that each rule finds, at least.
    """

    quarantined: float | None = None
    largest_label: float | None = None
    label_drift: float | None = None
    input_drift: float | None = None
    near_duplicates: float | None = None
    conflicts: float | None = None
    suspects: float | None = None
    slice_ratio: float | None = None
    canary_recall: float | None = None


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`rules` for rows, `bounds` for windows, and the inputs whose values are the `slices`."""

    rules: list[Rule] = []
    bounds: Bounds = msgspec.field(default_factory=Bounds)
    slices: list[str] = []


def mistakes(quality: Quality, inputs: Mapping[str, str], values: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is wrong with the section, as (field, problem); given are the types of inputs and outcome values by name."""
    found: list[tuple[str, str]] = []
    for name, times in Counter(rule.name for rule in quality.rules).items():
        if times > 1:
            found.append(("quality.rules", f"the name {name} is there {times} times; a row is quarantined by it"))
    for rule in quality.rules:
        found += [(f"quality.rules.{rule.name}", problem) for problem in _problems(rule, inputs, values)]
    found += [
        ("quality.slices", f"{name} is not one of inputs ({', '.join(inputs)})")
        for name in quality.slices
        if name not in inputs
    ]
    if quality.bounds.slice_ratio is not None and not quality.slices:
        found.append(("quality.bounds.slice_ratio", "needs quality.slices: the inputs whose values are looked at"))
    for name, bound in msgspec.structs.asdict(quality.bounds).items():
        if bound is not None and not (bound >= 0 if name.endswith("_drift") else 0 <= bound <= 1):
            found.append((f"quality.bounds.{name}", "is a share: 0 to 1" if bound > 1 else "must not be negative"))
    return found


def _problems(rule: Rule, inputs: Mapping[str, str], values: Mapping[str, str]) -> list[str]:
    """What is wrong with one rule."""
    if len(rule.conditions) != 1:
        return [f"give exactly one condition of range, one_of, length, matches, free_of, check; not {rule.conditions}"]
    [condition] = rule.conditions
    if rule.check is not None:
        return _problems_of_check(rule.check, rule.field, inputs)
    types = {**inputs, **{f"values.{name}": kind for name, kind in values.items()}}
    if rule.field is None or rule.field not in types:
        return [f"field is {rule.field}; it must be one of {', '.join(types)}"]
    kind = types[rule.field]
    if condition == "range" and kind not in ("number", "integer"):
        return [f"range is for numbers; {rule.field} is a {kind}"]
    if condition in ("one_of", "length", "matches", "free_of") and kind != "string":
        return [f"{condition} is for texts; {rule.field} is a {kind}"]
    for bounds in (rule.range, rule.length):
        if bounds is not None and bounds[0] > bounds[1]:
            return [f"{condition}: {bounds[0]} is above {bounds[1]}"]
    if rule.matches is not None:
        try:
            re.compile(rule.matches)
        except re.error as exc:
            return [f"matches is not a regular expression: {exc}"]
        if re.search(r"\(\?[=!<]|\\[1-9]", rule.matches):
            return ["matches: look-around and back-references are not known to RE2, which reads it"]
    return []


def _problems_of_check(check: str, field: str | None, types: Mapping[str, str]) -> list[str]:
    if field is not None:
        return ["check is about all inputs: leave field out"]
    try:
        kind = parse(check, types).type
    except ContractError as exc:
        return [f"check: {exc}"]
    return [] if kind == "boolean" else [f"check gives a {kind}; write a condition"]
