"""Quality control: which rows of a window break the contract's rules, and whether the window is fit to learn from.

Everything is measured in SQL over the window's current ground truth. Rows that break a rule are quarantined: they stay
in the ground truth, and no model learns from them until a person releases them. A window beyond a bound is not sealed.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import datetime

import msgspec
import pyarrow as pa

from accrual.contract import Contract
from accrual.lake import Lake
from consumers import quality_queries as queries
from consumers.expression_sql import quoted
from consumers.rule_sql import canaries, is_broken
from consumers.typed_views import typed_view

CANARIES = 50  # of each rule
FEW_TEXTS = 50  # different ones in the reference, up to which each is a bin
SUSPECTED = "suspected_label"


class Finding(msgspec.Struct, frozen=True):
    """A row that breaks a rule, or whose label is suspected."""

    prediction_id: str
    revision: int
    rule: str
    detail: str


class Measure(msgspec.Struct, frozen=True):
    """Something measured of a window; `of` says of what in it. `least`: the bound is a lower one."""

    measure: str
    of: str
    value: float
    bound: float | None
    least: bool = False

    @property
    def broken(self) -> bool:
        """Whether the value is beyond its bound."""
        if self.bound is None:
            return False
        return self.value < self.bound if self.least else self.value > self.bound

    @property
    def said(self) -> str:
        """The measure and its bound, for a person."""
        of = f" of {self.of}" if self.of else ""
        bound = "" if self.bound is None else f", {'least' if self.least else 'most'} {self.bound:g}"
        return f"{self.measure}{of} {self.value:.3f}{bound}"


class Inspection(msgspec.Struct, frozen=True):
    """What was found in a window."""

    findings: list[Finding]
    measures: list[Measure]

    @property
    def broken(self) -> list[Measure]:
        """The measures that are beyond their bounds: with any of them the window is not sealed."""
        return [measure for measure in self.measures if measure.broken]


def inspect(
    lake: Lake, contract: Contract, since: datetime, until: datetime, last: tuple[datetime, datetime] | None
) -> Inspection:
    """Inspect the predictions with since <= predicted_at < until; `last` are the bounds of the last sealed window."""
    view = typed_view(contract)
    lake.rows(queries.ROWS.format(name="inspected", view=view), [since, until])
    total = lake.rows("select count(*) as n from inspected")[0]["n"]
    broken = _broken_rows(lake, contract)
    only_warn = {rule.name for rule in contract.quality.rules if rule.warn}
    findings = [finding for finding in broken if finding.rule not in only_warn]
    share = len({finding.prediction_id for finding in findings}) / max(total, 1)
    bounds = contract.quality.bounds
    measures = [Measure("quarantined", "", share, bounds.quarantined)]
    counts = Counter(finding.rule for finding in broken)
    measures += [
        Measure("broken", rule.name, counts[rule.name] / max(total, 1), None) for rule in contract.quality.rules
    ]
    measures += _measures_of_labels(lake, contract)
    if last is not None:
        lake.rows(queries.ROWS.format(name="reference", view=view), [*last])
        measures += _drift(lake, contract)
    suspects = msgspec.convert(
        lake.rows(
            f"""
            select prediction_id, revision, {quoted(SUSPECTED)} as rule,
                format('labeled {{}}; the model was confident of {{}}', label, guess) as detail
            from suspects order by prediction_id
            """
        ),
        list[Finding],
    )
    if bounds.suspects is not None:
        findings += suspects
    measures += _measures_of_slices(lake, contract, since, until) + _measures_of_canaries(lake, contract)
    return Inspection(findings, measures)


def _broken_rows(lake: Lake, contract: Contract) -> list[Finding]:
    rules = {rule.name: rule for rule in contract.quality.rules}
    if not rules:
        return []
    conditions = ", ".join(
        f"if({is_broken(rule, contract, _input)}, {quoted(name)}, null)" for name, rule in rules.items()
    )
    found = lake.rows(queries.BROKEN.format(conditions=conditions) + " order by prediction_id, rule")
    return [
        Finding(row["prediction_id"], row["revision"], row["rule"], _detail(rules[row["rule"]].field)) for row in found
    ]


def _detail(field: str | None) -> str:
    """What it is about, without the value: that may be what must not be kept."""
    return f"{field} breaks the rule" if field else "the inputs break the rule"


def _measures_of_labels(lake: Lake, contract: Contract) -> list[Measure]:
    bounds = contract.quality.bounds
    lake.rows(queries.SUSPECTS)
    measured = {
        "largest_label": (queries.LARGEST_LABEL, bounds.largest_label),
        "conflicts": (queries.CONFLICTS, bounds.conflicts),
        "suspects": (
            "select (select count(*) from suspects) / count(*) as value from inspected where label is not null",
            bounds.suspects,
        ),
    }
    texts = [_input(name) for name, field in contract.inputs.items() if field.type == "string"]
    if texts and bounds.near_duplicates is not None:
        query = queries.NEAR_DUPLICATES.format(text=f"concat_ws(chr(10), {', '.join(texts)})")
        measured["near_duplicates"] = (query, bounds.near_duplicates)
    found = [(name, lake.rows(query)[0]["value"], bound) for name, (query, bound) in measured.items()]
    return [Measure(name, "", value, bound) for name, value, bound in found if value is not None]


def _drift(lake: Lake, contract: Contract) -> list[Measure]:
    bounds = contract.quality.bounds
    found = _drift_of(lake, "label", "", "label", bounds.label_drift, is_number=False)
    for name, field in contract.inputs.items():
        value, is_number = _input(name), field.type in ("number", "integer")
        if field.type == "string" and _different(lake, value) > FEW_TEXTS:
            value, is_number = f"length({value})", True
        found += _drift_of(lake, "input", name, value, bounds.input_drift, is_number)
    return found


def _drift_of(lake: Lake, what: str, of: str, value: str, bound: float | None, is_number: bool) -> list[Measure]:
    shown = "list_count(list_filter(tenths, lambda cut: cut < value))::varchar" if is_number else "value::varchar"
    drift = lake.rows(
        queries.DRIFT.format(
            value=value,
            number="value" if is_number else "null::double",
            bin=f"case when value is not null then {shown} end",
        )
    )[0]
    return [Measure(f"{what}_drift", of, drift["psi"], bound), Measure(f"{what}_divergence", of, drift["js"], None)]


def _different(lake: Lake, value: str) -> int:
    return int(lake.rows(f"select approx_count_distinct({value}) as n from reference")[0]["n"])


def _measures_of_slices(lake: Lake, contract: Contract, since: datetime, until: datetime) -> list[Measure]:
    found = []
    for name in contract.quality.slices:
        names = [name, *contract.inputs[name].names_before]
        value = f"coalesce({', '.join(f'json_extract_string(inputs, [{quoted(_path(n))}])[1]' for n in names)})"
        slices = lake.rows(queries.SLICES.format(value=value), [contract.stream, since, until])
        bound = contract.quality.bounds.slice_ratio
        found += [
            Measure("slice_ratio", f"{name}={row['slice']}", row["value"], bound, least=True)
            for row in slices
            if row["value"] is not None
        ]
    return found


def _measures_of_canaries(lake: Lake, contract: Contract) -> list[Measure]:
    """Values made to break each rule: the share that the rule finds. The same ones each time."""
    found = []
    for rule in contract.quality.rules:
        planted = canaries(rule, random.Random(f"{contract.training.seed} {rule.name}"), CANARIES)
        if planted:
            with lake.with_tables({"planted": pa.table({"value": planted})}):
                broken = is_broken(rule, contract, lambda _: "value")
                recall = lake.rows(f"select avg(({broken})::integer) as value from planted")[0]["value"]
            found.append(Measure("canary_recall", rule.name, recall, contract.quality.bounds.canary_recall, least=True))
    return found


def _path(name: str) -> str:
    return '$."' + name.replace('"', '\\"') + '"'


def _input(name: str) -> str:
    """SQL for an input of a row of `inspected`, or for `values.NAME` of its outcome."""
    struct, field = ('"values"', name.removeprefix("values.")) if name.startswith("values.") else ("inputs", name)
    return f"{struct}." + '"' + field.replace('"', '""') + '"'
