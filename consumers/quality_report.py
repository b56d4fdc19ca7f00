"""The report of a sealed window: one HTML file that fetches nothing, with bars as inline SVG, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from accrual.errors import NotFound
from accrual.lake import Lake

_EXPLAINED = {
    "quarantined": "share of rows that broke a rule which quarantines",
    "broken": "share of rows that broke each rule",
    "largest_label": "share of the commonest label",
    "conflicts": "share of rows with the inputs of another row and another label",
    "near_duplicates": "share of rows that nearly repeat another",
    "suspects": "share of labels that the model in service was confidently of another opinion about",
    "label_drift": "labels against the window before: population stability index",
    "label_divergence": "labels against the window before: Jensen-Shannon divergence, nats",
    "input_drift": "inputs against the window before: population stability index",
    "input_divergence": "inputs against the window before: Jensen-Shannon divergence, nats",
    "slice_ratio": "share of a slice among labeled rows over its share among all predictions",
    "canary_recall": "planted bad values that each rule finds",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6675; --paper: #fbfaf7; --line: #d9d6cd;
  --bar: #1f6fb2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #9aa3b2; --paper: #14171d; --line: #343a46;
  --bar: #6db3f2; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 60rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .25rem; }
.soft { color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.n { text-align: right; width: 6rem; } th { font-weight: 500; font-size: .85rem; color: var(--soft); }
svg { display: block; } rect { fill: var(--bar); }
line { stroke: var(--ink); stroke-dasharray: 2 3; }
"""
_BAR = 320


def window_report(lake: Lake, stream: str, window: int) -> str:
    """The page about a sealed window. Raises NotFound if there is none with that number."""
    found = lake.rows('from windows where stream = ? and "window" = ?', [stream, window])
    if not found:
        raise NotFound(f"stream {stream} has no sealed window {window}; `accrual windows --stream {stream}` lists them")
    measures = lake.rows(
        'select measure, of, value, bound from quality where stream = ? and "window" = ? order by measure, value desc',
        [stream, window],
    )
    held = lake.rows(
        """
        select rule, state, count(*) as rows from quarantined where stream = ? and "window" = ?
        group by all order by all
        """,
        [stream, window],
    )
    labels = lake.rows(
        """
        select coalesce(label, 'none') as label, count(*) as rows from (
            select label from sealed_rows where stream = ? and "window" = ? and not later
            qualify row_number() over (partition by prediction_id order by revision desc, "offset") = 1
        ) group by all order by rows desc, label limit 40
        """,
        [stream, window],
    )
    w = found[0]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Window {window} of {escape(stream)}</title><style>{_STYLE}</style></head><body>
<h1>Window {window} of {escape(stream)}</h1>
<p class="soft">{w["rows"]:,} predictions from {w["from_time"]:%Y-%m-%d %H:%M} to {w["to_time"]:%Y-%m-%d %H:%M};
{w["labeled"]:,} labeled ({w["coverage"]:.1%}), maturity {w["maturity"]:.1%};
sealed {w["sealed_at"]:%Y-%m-%d %H:%M} UTC, snapshot {w["snapshot_id"]}, digest <code>{w["digest"][:16]}</code></p>
{_groups(measures)}
<h2>Labels</h2>
{_table(["label", "rows", ""], [(row["label"], row["rows"], None) for row in labels])}
<h2>Quarantine</h2>
{_quarantine(held)}
</body></html>
"""


def _groups(measures: Sequence[dict[str, Any]]) -> str:
    """A table for each measure, in the order in which they are explained."""
    parts = []
    for name, explained in _EXPLAINED.items():
        rows = [m for m in measures if m["measure"] == name]
        if rows:
            shown = [(m["of"] or "the window", m["value"], m["bound"]) for m in rows]
            parts.append(f'<h2>{name.replace("_", " ")}</h2><p class="soft">{explained}</p>')
            parts.append(_table(["of", "value", "dashed: the contract's bound"], shown))
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[tuple[str, float, float | None]]) -> str:
    longest = max([*(value for _, value, _ in rows), *(bound for *_, bound in rows if bound), 1e-9])
    lines = []
    for name, value, bound in rows:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        mark = f'<line x1="{x}" x2="{x}" y1="0" y2="14"/>' if bound and (x := round(_BAR * bound / longest)) else ""
        rect = f'<rect width="{round(_BAR * value / longest)}" height="14"/>'
        bar = f'<svg width="{_BAR + 2}" height="14">{rect}{mark}</svg>'
        lines.append(f'<tr><td>{escape(name)}</td><td class="n">{shown}</td><td>{bar}</td></tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _quarantine(held: Sequence[dict[str, Any]]) -> str:
    if not held:
        return "<p>No row broke a rule.</p>"
    lines = "".join(
        f'<tr><td>{escape(row["rule"])}</td><td>{row["state"]}</td><td class="n">{row["rows"]:,}</td></tr>'
        for row in held
    )
    return f"<table><tr><th>rule</th><th>state</th><th>rows</th></tr>{lines}</table>"
