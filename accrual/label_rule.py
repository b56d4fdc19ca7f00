"""The contract's rule for labels: how it is written, what makes no sense, and which numbers a sum may add.

What it means for the outcomes of one prediction is in docs/contract.md; the join carries it out (`streams/label.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import msgspec

from accrual.errors import ContractError, Rejected
from accrual.expression import half_away, outcomes_of, parse
from accrual.output import Output

LARGEST_SUMMAND = 1e15
"""Sums are exact, in millionths; what is added must be no larger than this."""


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """How the label follows from the outcomes that count.

    What one outcome says is the value of `field`, or what `expression` makes of its values, through `map` when there is
    one. What several say together is the `last` or `first` observed, the `majority`, or the label of the highest of the
    `thresholds` that the `sum` reaches. There is no label before `complete_when` outcomes count.
    `sources`, best first: outcomes of a worse source decide nothing once those of a better one give a label.
    """

    field: str | None = None
    expression: str | None = None
    map: dict[str, str] | None = None
    take: Literal["last", "first", "majority", "sum"] = "last"
    thresholds: dict[str, float] | None = None
    complete_when: int = 1
    sources: list[str] | None = None

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Source → its rank, 0 the best; sources that are not there share the rank after the last."""
        return {source: rank for rank, source in enumerate(self.sources or [])}

    @cached_property
    def first_decides(self) -> bool:
        """Whether the first outcome that counts gives a label: what it says."""
        return self.complete_when == 1 and self.take != "sum"

    @cached_property
    def floors(self) -> list[tuple[float, str]]:
        """The thresholds in whole millionths with their labels, highest first."""
        floors = ((floor * 1e6, label) for label, floor in (self.thresholds or {}).items())
        return sorted(((half_away(f) if f > -math.inf else f, label) for f, label in floors), reverse=True)


def summand(label: Label, text: str) -> str:
    """The number, as text, that an outcome adds to the sum.

    Raises Rejected("invalid_values") for one that is too large, or below 0 where that could take a label back.
    """
    number = float(text)
    if abs(number) > LARGEST_SUMMAND:
        raise Rejected("invalid_values", f"the label's sum adds {text}; at most {LARGEST_SUMMAND:.0e} is allowed")
    if number < 0 and label.floors[-1][0] > -math.inf:
        raise Rejected(
            "invalid_values",
            f"the label's sum adds {text}; below 0 needs a threshold of -.inf, so that every sum has a label",
        )
    return text


def inconsistencies(label: Label, fields: Mapping[str, str], output: Output) -> list[tuple[str, str]]:
    """What is wrong with a rule over `fields` (name → type), as (contract field, problem and fix)."""
    if (label.field is None) == (label.expression is None):
        return [("label", "give exactly one of field (an outcome value) and expression (computed from them)")]
    found: list[tuple[str, str]] = []
    where, kind = "label.field", "null"
    if label.field is not None:
        if label.field not in fields:
            return [("label.field", f"'{label.field}' is not in outcome.values ({', '.join(fields)})")]
        kind = fields[label.field]
    else:
        where = "label.expression"
        try:
            tree = parse(label.expression or "", fields)
        except ContractError as exc:
            return [(where, str(exc))]
        if tree.type == "null":
            return [(where, "is always None; one branch must give a label")]
        kind = tree.type
        # A text that is written there must be known; what comes from a field is seen when an outcome comes.
        said = [str(end.value) for end in outcomes_of(tree) if end.op == "constant" and end.type == "string"]
        if label.map is None:
            found += [(where, f"'{text}' {output.refusal}") for text in said if not output.accepts(text)]
        else:
            found += [
                (where, f"'{text}' is not one of label.map; add it there") for text in said if text not in label.map
            ]
    named = [("label.map", label.map.values() if label.map else ()), ("label.thresholds", label.thresholds or ())]
    found += [
        (field, f"'{value}' {output.refusal}")
        for field, values in named
        for value in values
        if not output.accepts(value)
    ]
    floors = list((label.thresholds or {}).values())
    if not all(floor == -math.inf or abs(floor) <= LARGEST_SUMMAND for floor in floors):
        problem = f"are numbers of at most {LARGEST_SUMMAND:.0e}, or -.inf for a label that every sum has"
        return [*found, ("label.thresholds", problem)]
    is_sum = label.take == "sum"
    rules: list[tuple[str, bool, str]] = [
        (where, not is_sum or kind in ("number", "integer"), f"is a {kind}; `take: sum` adds numbers"),
        ("label.take", not (is_sum and output.task == "score"), "`sum` gives one of some labels; a score has none"),
        ("label.map", not (is_sum and label.map), "has no use with `take: sum`: label.thresholds names the labels"),
        ("label.thresholds", is_sum or label.thresholds is None, "needs `take: sum`"),
        ("label.thresholds", not is_sum or bool(floors), "`take: sum` needs it: label → the least sum that has it"),
        ("label.thresholds", len(dict(label.floors)) == len(floors), "two labels have the same least sum"),
        ("label.complete_when", label.complete_when >= 1, "must be at least 1"),
        (
            "label.sources",
            label.sources is None or 0 < len(set(label.sources)) == len(label.sources),
            "names at least one source, each once, the best first; or leave it out",
        ),
    ]
    return found + [(field, problem) for field, fine, problem in rules if not fine]
