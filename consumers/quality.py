"""Quality control of a window: which rows break a rule, how the window as a whole looks, and what must not be sealed.

    checked  = the window's rows, typed by the contract
    broken   = what rules find in them
    kept     = checked without rows that are in quarantine: now broken, or rejected before; released ones stay
    metrics  = balance, drift, duplicates, conflicts, errors of labels in `kept`; coverage of slices in all predictions
    canaries = rows made to break the rules: the recall of each rule
    verdicts = the metrics by the contract's bounds

All of it in SQL over one snapshot of the lake. What rows broke goes to the lake's table `quarantine`, the rest to
`quality`; docs/quality.md documents both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import pyarrow as pa

from accrual.contract import Contract
from accrual.lake import Lake
from accrual.lake_tables import TABLES
from accrual.output import Output
from accrual.quality_rules import Bound, Quality, Rule
from consumers import near_duplicates
from consumers import quality_queries as queries
from consumers.canaries import hatch
from consumers.expression_sql import quoted
from consumers.rule_sql import column_of, violations_sql
from consumers.typed_views import typed_view

_DIGITS = 6
_SHOWN = 50  # rows of each kind that a report lists
_CANARIES_OF = 500  # rows that canaries are made of


class Finding(msgspec.Struct, frozen=True):
    """One metric of a window. `verdict`: `ok`, `warn` and `failed` by a bound; `measured` where there is none."""

    metric: str
    field: str
    part: str
    value: float
    bound: str
    verdict: Literal["ok", "warn", "failed", "measured"]

    @property
    def said(self) -> str:
        """For a person."""
        what = " ".join(part for part in (self.metric, self.field, self.part) if part)
        return f"{what} is {self.value:g}" + (f", must be {self.bound}" if self.bound else "")


class Bar(msgspec.Struct, frozen=True):
    """How many rows of this window and of the one before have a value (or lie in a tenth) of a field."""

    field: str
    part: str
    now: int
    before: int


class Report(msgspec.Struct, frozen=True):
    """What was found in one window. `broken`: rows of the table `quarantine`, and those of rules that only warn.

    `suspected` and `near`: the first few label errors and near-duplicates, for people.
    """

    stream: str
    window: int
    since: datetime
    until: datetime
    rows: int
    kept: int
    findings: list[Finding]
    broken: list[dict[str, Any]]
    bars: list[Bar]
    suspected: list[dict[str, Any]]
    near: list[dict[str, Any]]

    @property
    def failed(self) -> list[Finding]:
        """What must not be sealed."""
        return [finding for finding in self.findings if finding.verdict == "failed"]


def inspect(lake: Lake, contract: Contract, window: int, since: datetime, until: datetime) -> Report:
    """Check the predictions of `since` up to `until`. Use one snapshot: a pinned lake, or a transaction."""
    quality = contract.quality or Quality()
    _load(lake, contract, "checked", since, until)
    rules = {rule.name: rule for rule in quality.rules}
    broken = [row for rule in quality.rules for row in lake.rows(violations_sql(contract, rule, "checked"))]
    undecided = _keep(lake, contract, broken, rules)
    rows, kept = (lake.rows(f"select count(*) as n from {name}")[0]["n"] for name in ("checked", "kept"))
    measured = [
        {"metric": "violations", "field": name, "part": "", "value": undecided[name] / rows} for name in rules if rows
    ]
    measured += _labels_and_duplicates(lake, quality, contract.output)
    measured += _drift(lake, contract, window) + _recall(lake, contract)
    if quality.slices:
        lake.rows(queries.everyone(contract), [since, until])
    for name in quality.slices:
        measured += lake.rows(queries.slice_metrics(name))
    return Report(
        stream=contract.stream,
        window=window,
        since=since,
        until=until,
        rows=rows,
        kept=kept,
        findings=[_judged(quality, m) for m in sorted(measured, key=lambda m: (m["metric"], m["field"], m["part"]))],
        broken=[row | {"severity": rules[row["rule"]].severity} for row in broken],
        bars=msgspec.convert(lake.rows(queries.BARS), list[Bar]),
        suspected=lake.rows(f"from suspected order by probability desc, prediction_id limit {_SHOWN}"),
        near=lake.rows(f"select text, like_text, similarity from near order by all limit {_SHOWN}"),
    )


def unrecorded(lake: Lake, report: Report) -> dict[str, pa.Table]:
    """The rows of `quarantine` and `quality` that a report has and the lake has not yet, by table."""
    at = datetime.now(UTC)
    said = {
        (row["metric"], row["field"], row["part"]): (row["value"], row["verdict"], row["bound"])
        for row in lake.rows(
            'from quality where stream = ? and "window" = ? order by "at"', [report.stream, report.window]
        )
    }
    metrics = [
        {**msgspec.structs.asdict(f), "stream": report.stream, "window": report.window, "at": at}
        for f in report.findings
        if said.get((f.metric, f.field, f.part)) != (f.value, f.verdict, f.bound)
    ]
    known = {
        (row["prediction_id"], row["rule"])
        for row in lake.rows("select distinct prediction_id, rule from quarantine where stream = ?", [report.stream])
    }
    entry = {
        "stream": report.stream,
        "window": report.window,
        "state": "quarantined",
        "by": "check",
        "note": "",
        "at": at,
        "offset": -1,
    }
    held = [
        {**row, **entry}
        for row in report.broken
        if row["severity"] == "quarantine" and (row["prediction_id"], row["rule"]) not in known
    ]
    rows: Mapping[str, list[dict[str, Any]]] = {"quarantine": held, "quality": metrics}
    return {table: pa.Table.from_pylist(some, TABLES[table]) for table, some in rows.items() if some}


def _load(lake: Lake, contract: Contract, name: str, since: datetime, until: datetime) -> None:
    lake.rows(
        f"create or replace temp table {name} as select prediction_id, revision, model, output, label, inputs,"
        f' "values", inputs_json, values_json from ({typed_view(contract)})'
        " where predicted_at >= ? and predicted_at < ?",
        [since, until],
    )


def _keep(lake: Lake, contract: Contract, broken: list[dict[str, Any]], rules: Mapping[str, Rule]) -> Counter[str]:
    """Make `kept`: the rows that are, as far as this check can tell, to be trained on.

    Returns how many rows break each rule that nobody has decided about.
    """
    schema = pa.schema([("prediction_id", pa.string()), ("rule", pa.string())])
    held = [row for row in broken if rules[row["rule"]].severity == "quarantine"]
    now = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in held], schema)
    with lake.with_tables({"broken_now": now}):
        lake.rows(
            """
            create or replace temp table kept as
            with decided as (select prediction_id, rule, state from lake.quarantined where stream = ?)
            from checked where prediction_id not in (
                select prediction_id from decided where state <> 'released'
                union all
                select prediction_id from broken_now anti join decided using (prediction_id, rule)
            )
            """,
            [contract.stream],
        )
    decided = {
        (row["prediction_id"], row["rule"])
        for row in lake.rows(
            "select prediction_id, rule from quarantined where stream = ? and state <> 'quarantined'", [contract.stream]
        )
    }
    return Counter(row["rule"] for row in broken if (row["prediction_id"], row["rule"]) not in decided)


def _labels_and_duplicates(lake: Lake, quality: Quality, output: Output) -> list[dict[str, Any]]:
    lake.rows(queries.LABEL_ERRORS)
    queries_by_metric = {
        "label_share": queries.LABEL_NAME_SHARES if output.task == "multilabel" else queries.LABEL_SHARES,
        "duplicates": queries.DUPLICATES,
        "label_conflicts": queries.LABEL_CONFLICTS,
        "label_errors": queries.LABEL_ERROR_SHARE,
    }
    measured = [
        row for name, query in queries_by_metric.items() if name not in output.unmeasured for row in lake.rows(query)
    ]
    near_duplicates.find_near_duplicates(lake, column_of(quality.text) if quality.text else "null::varchar")
    return measured + lake.rows(near_duplicates.SHARE)


def _drift(lake: Lake, contract: Contract, window: int) -> list[dict[str, Any]]:
    """Against the last sealed window before; without one there is none, and the bins show this one only."""
    last = lake.rows(
        'select from_time, to_time from windows where stream = ? and "window" < ? order by "window" desc limit 1',
        [contract.stream, window],
    )
    if not last:
        lake.rows("create or replace temp table binned (side varchar, field varchar, part varchar)")
        return []
    _load(lake, contract, "before", last[0]["from_time"], last[0]["to_time"])
    many = {row["field"] for row in lake.rows(queries.many_valued(contract))}
    lake.rows(queries.binned(contract, many))
    return lake.rows(queries.DRIFT)


def _recall(lake: Lake, contract: Contract) -> list[dict[str, Any]]:
    """The share of its canaries that each rule finds."""
    quality = contract.quality
    if quality is None or quality.canaries is None:
        return []
    rows = lake.rows(
        f"select inputs_json, values_json from checked order by md5(prediction_id), prediction_id limit {_CANARIES_OF}"
    )
    decoded = [
        {
            "inputs": contract.decode_inputs(row["inputs_json"].encode()),
            "values": contract.decode_values(row["values_json"].encode()) if row["values_json"] else None,
        }
        for row in rows
    ]
    canaries = hatch(contract, quality.canaries, decoded)
    table = pa.table(
        {
            "stream": [contract.stream] * len(canaries),
            "prediction_id": [f"{n}" for n in range(len(canaries))],
            "revision": pa.array([0] * len(canaries), pa.int32()),
            "inputs": [canary.inputs for canary in canaries],
            "values": [canary.values for canary in canaries],
            "broken": [canary.rule for canary in canaries],
        }
    )
    measured = []
    with lake.with_tables({"canaries": table}):
        for rule in quality.rules:
            made = sum(canary.rule == rule.name for canary in canaries)
            rows_of_rule = f"(from ({typed_view(contract, 'canaries')}) where broken = {quoted(rule.name)})"
            found = lake.rows(violations_sql(contract, rule, rows_of_rule)) if made else []
            if made:
                recall = len(found) / made
                measured.append({"metric": "canary_recall", "field": rule.name, "part": "", "value": recall})
    return measured


def _judged(quality: Quality, measured: dict[str, Any]) -> Finding:
    """By the bound that names the metric's field, else by the one for all of the metric."""
    value = round(measured["value"], _DIGITS)
    fitting = [b for b in _bounds(quality) if b.metric == measured["metric"] and b.field in (None, measured["field"])]
    bound = max(fitting, key=lambda b: b.field is not None, default=None)
    if bound is None:
        return Finding(measured["metric"], measured["field"], measured["part"], value, "", "measured")
    verdict: Literal["ok", "warn", "failed"] = "ok"
    if not bound.holds(value):
        verdict = "warn" if bound.severity == "warn" else "failed"
    return Finding(measured["metric"], measured["field"], measured["part"], value, str(bound), verdict)


def _bounds(quality: Quality) -> list[Bound]:
    own = [Bound(metric="canary_recall", least=quality.canaries.recall)] if quality.canaries else []
    return [*quality.bounds, *own]
