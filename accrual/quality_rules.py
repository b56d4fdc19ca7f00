"""The contract's `quality` section: what a row must fulfil, and how a window may look (docs/quality.md).

Rules and bounds are carried out in SQL over the lake (`consumers/quality.py`); here they are read and checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from accrual.errors import ContractError
from accrual.expression import Node, parse

OUTCOME = "values."
METRICS = {
    "violations": "share of rows that break a rule and nobody has decided about; `field` is the rule's name",
    "canary_recall": "share of rows made to break a rule that it finds; `field` is the rule's name",
    "label_share": "share of a label among the labeled; `field` is the label",
    "psi": "population stability index against the last sealed window; `field` is an input or `label`",
    "jensen_shannon": "Jensen-Shannon divergence in bits, from 0 to 1; `field` is an input or `label`",
    "duplicates": "share of rows whose inputs came before in the window",
    "near_duplicates": "share of the distinct texts that are nearly one of the others",
    "label_conflicts": "share of the labeled whose inputs have another label too",
    "label_errors": "share of the labeled whose label the predictions confidently contradict",
    "coverage": "share of all predictions of a slice that are labeled; `field` is one of slices",
    "representation": "Jensen-Shannon divergence in bits between the labeled and all; `field` is one of slices",
}
"""What is measured of every window, and what `field` is where a metric has several values."""

Metric = Literal[
    "violations",
    "canary_recall",
    "label_share",
    "psi",
    "jensen_shannon",
    "duplicates",
    "near_duplicates",
    "label_conflicts",
    "label_errors",
    "coverage",
    "representation",
]


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `least` to `most`, both included; one of them may be left out."""

    least: float | None = None
    most: float | None = None


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every row must fulfil; one that does not is put into quarantine, or (`warn`) only counted.

    Either `expression` is given, over all fields, or `field` (an input, or `values.NAME`) and one of the others.
    A value that is null breaks no rule, and an expression breaks only when it is false: as CHECK in SQL.
    """

    name: str
    field: str | None = None
    range: Span | None = None
    categories: list[str] | None = None
    matches: str | None = None
    length: Span | None = None
    scripts: list[str] | None = None
    pii: Literal["forbid"] | None = None
    expression: str | None = None
    severity: Literal["quarantine", "warn"] = "quarantine"

    @property
    def kind(self) -> str:
        """Which of the conditions it has."""
        return next(name for name in CONDITIONS if getattr(self, name) is not None)


CONDITIONS = ("range", "categories", "matches", "length", "scripts", "pii", "expression")


class Bound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a metric of a window may be. With `field` it is about that one, without about all of the metric.

    A window beyond a bound is not sealed, unless `severity` is `warn`.
    """

    metric: Metric
    field: str | None = None
    least: float | None = None
    most: float | None = None
    severity: Literal["fail", "warn"] = "fail"

    def holds(self, value: float) -> bool:
        """Whether a value is within."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        ends = [f"at least {self.least:g}"] if self.least is not None else []
        ends += [f"at most {self.most:g}"] if self.most is not None else []
        return ", ".join(ends)


class Canaries(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For each rule so many `rows` of a window are made to break it; the rule must find the share `recall` of them."""

    rows: int = 25
    recall: float = 1.0
    seed: int = 17


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules for rows, bounds for windows.

    `text`: the input whose wording is compared to find near-duplicates. `slices`: categorical inputs for which coverage
    is measured. `canaries`: whether the rules are tried on rows that break them whenever a window is checked.
    """

    rules: list[Rule] = []
    bounds: list[Bound] = []
    text: str | None = None
    slices: list[str] = []
    canaries: Canaries | None = None


def rule_fields(inputs: Mapping[str, str], values: Mapping[str, str]) -> dict[str, str]:
    """The names of an expression with their types: inputs as they are, outcome values as `values_NAME`."""
    return {**{f"values_{name}": kind for name, kind in values.items()}, **inputs}


def rule_tree(rule: Rule, inputs: Mapping[str, str], values: Mapping[str, str]) -> Node:
    """The tree of a rule's expression. Raises ContractError."""
    tree = parse(rule.expression or "", rule_fields(inputs, values))
    if tree.type != "boolean":
        raise ContractError("says no true or false; write a condition that a good row fulfils, such as amount > 0")
    return tree


def mistakes(
    quality: Quality, inputs: Mapping[str, str], values: Mapping[str, str], classes: Sequence[str]
) -> list[tuple[str, str]]:
    """What is wrong with the section over fields (name → type), as (contract field, problem and fix)."""
    found: list[tuple[str, str]] = []
    names = Counter(rule.name for rule in quality.rules)
    for rule in quality.rules:
        problem = "another rule has this name too" if names[rule.name] > 1 else _mistake(rule, inputs, values)
        if problem:
            found.append(("quality.rules", f"{rule.name or '(no name)'}: {problem}"))
    fields = {
        "violations": names,
        "canary_recall": names,
        "label_share": classes,
        "psi": [*inputs, "label"],
        "jensen_shannon": [*inputs, "label"],
        "coverage": quality.slices,
        "representation": quality.slices,
    }
    for bound in quality.bounds:
        known = fields.get(bound.metric, [])
        if bound.least is None and bound.most is None:
            found.append(("quality.bounds", f"{bound.metric}: give least, most or both"))
        elif bound.field is not None and bound.field not in known:
            which = f"one of {', '.join(known)}" if known else "left out: the metric is one number"
            found.append(("quality.bounds", f"{bound.metric}: field is '{bound.field}'; it must be {which}"))
    if quality.text is not None and inputs.get(quality.text) != "string":
        found.append(("quality.text", f"'{quality.text}' is not a string of inputs"))
    found += [
        ("quality.slices", f"'{name}' is not a string, integer or boolean of inputs")
        for name in quality.slices
        if inputs.get(name) not in ("string", "integer", "boolean")
    ]
    canaries = quality.canaries
    if canaries is not None and not (1 <= canaries.rows <= 1000 and 0 <= canaries.recall <= 1):
        found.append(("quality.canaries", "rows are 1 to 1000, recall is a share: 0 to 1"))
    return found


def _mistake(rule: Rule, inputs: Mapping[str, str], values: Mapping[str, str]) -> str | None:
    if not rule.name:
        return "give it a name; quarantine says it as the reason"
    given = [name for name in CONDITIONS if getattr(rule, name) is not None]
    if len(given) != 1:
        return f"give exactly one of {', '.join(CONDITIONS)}"
    if rule.expression is not None:
        if rule.field is not None:
            return "an expression names its fields itself: leave field out"
        try:
            rule_tree(rule, inputs, values)
        except ContractError as exc:
            return f"expression: {exc}"
        return None
    types = {**inputs, **{OUTCOME + name: kind for name, kind in values.items()}}
    kind = types.get(rule.field or "")
    if kind is None:
        return f"field must be one of {', '.join(types)}"
    wanted = ("number", "integer") if rule.range is not None else ("string",)
    if kind not in wanted:
        return f"{given[0]} is about a {wanted[0]}, and {rule.field} is a {kind}"
    span = rule.range or rule.length
    if span is not None and (span.least is None and span.most is None):
        return f"{given[0]}: give least, most or both"
    if span is not None and span.least is not None and span.most is not None and span.least > span.most:
        return f"{given[0]}: least is greater than most"
    if rule.categories == []:
        return "categories: name at least one"
    if rule.scripts is not None:
        return _script_mistake(rule.scripts)
    return _pattern_mistake(rule.matches) if rule.matches is not None else None


def _script_mistake(scripts: Sequence[str]) -> str | None:
    for name in scripts:
        if not name.isalpha() or len(name) < 3 or _pattern_mistake(rf"\p{{{name}}}"):
            return f"scripts: '{name}' is no script of Unicode's; write Latin, Cyrillic, Greek, Han, Arabic or the like"
    return None if scripts else "scripts: name at least one"


def _pattern_mistake(pattern: str) -> str | None:
    import pyarrow as pa  # it has the regular expressions that DuckDB has, RE2's
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid as exc:
        return f"matches: {exc}"
    return None
