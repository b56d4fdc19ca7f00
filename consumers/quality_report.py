"""The quality of one window as a page: one HTML file, its bars as inline SVG; nothing is fetched, light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from consumers.quality import Bar, Finding, Report

_SHOWN_BARS = 20
_SHOWN_ROWS = 100
_WIDTH, _BAR, _LABEL = 460, 16, 150

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6675; --paper: #fbfaf7; --line: #d9d6cd;
  --now: #1f6fb2; --before: #b9bdc4; --ok: #1d7a46; --warn: #a06a00; --failed: #a8322d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #9aa3b2; --paper: #14171d; --line: #343a46;
  --now: #6db3f2; --before: #59616e; --ok: #5fcf8f; --warn: #e5b45a; --failed: #f08a84; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { max-width: 46rem; } .soft, figcaption, th { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figcaption { font-size: .85rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.now { fill: var(--now); } .before { fill: var(--before); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; font-size: .85rem; } td.number { text-align: right; }
.ok { color: var(--ok); } .warn { color: var(--warn); font-weight: 600; } .failed { color: var(--failed);
  font-weight: 600; }
"""
_NEEDED = {"failed": 0, "warn": 1, "ok": 2, "measured": 3}


def render(report: Report) -> str:
    """The whole page."""
    counts = Counter(finding.verdict for finding in report.findings)
    verdict = "failed" if counts["failed"] else "warn" if counts["warn"] else "ok"
    said = {
        "failed": f"{counts['failed']} metrics are beyond a bound: the window is not sealed",
        "warn": f"{counts['warn']} metrics are beyond a bound that only warns",
        "ok": "within all bounds",
    }[verdict]
    title = f"{report.stream}, window {report.window}"
    findings = sorted(report.findings, key=lambda f: (_NEEDED[f.verdict], f.metric, f.field, f.part))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quality of {escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="soft">Predictions from {report.since:%Y-%m-%d %H:%M} up to {report.until:%Y-%m-%d %H:%M} UTC:
{report.rows:,} rows, of which {report.rows - report.kept:,} are in quarantine or rejected.</p>
<p class="{verdict}">{escape(said)}</p>
<h2>Metrics</h2>
<div class="scroll">{_table(["metric", "of", "value", "bound", "verdict"], map(_metric, findings))}</div>
<h2>Rows that break a rule</h2>
{_broken(report.broken)}
<h2>Against the window before</h2>
{_charts(report.bars)}
<h2>Labels that the predictions contradict</h2>
<p>Suspects, not errors: the likelier label is what the model was confident of before the label was known.</p>
{_some(report.suspected, ["prediction_id", "label", "likelier", "probability"])}
<h2>Texts that are nearly the same</h2>
{_some(report.near, ["text", "like_text", "similarity"])}
</body></html>
"""


def _metric(finding: Finding) -> list[tuple[str, str]]:
    return [
        (finding.metric, ""),
        (" ".join(part for part in (finding.field, finding.part) if part), ""),
        (f"{finding.value:g}", "number"),
        (finding.bound, ""),
        (finding.verdict, finding.verdict),
    ]


def _broken(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    counts = Counter((row["rule"], row["severity"]) for row in rows)
    said = "; ".join(f"{rule}: {count} ({severity})" for (rule, severity), count in counts.most_common())
    return f"<p>{escape(said)}</p>{_some(rows, ['prediction_id', 'rule', 'detail'])}"


def _some(rows: Sequence[dict[str, Any]], columns: list[str]) -> str:
    if not rows:
        return "<p>None.</p>"
    cells = ([(str(row[name]), "") for name in columns] for row in rows[:_SHOWN_ROWS])
    more = f"<p class='soft'>and {len(rows) - _SHOWN_ROWS:,} more</p>" if len(rows) > _SHOWN_ROWS else ""
    return f'<div class="scroll">{_table(columns, cells)}</div>{more}'


def _table(columns: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{escape(text)}</td>' for text, kind in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _charts(bars: Sequence[Bar]) -> str:
    if not bars:
        return "<p>There is none to compare with.</p>"
    return (
        f'<div class="charts">{"".join(_chart(name, list(of)) for name, of in groupby(bars, lambda b: b.field))}</div>'
    )


def _chart(field: str, bars: Sequence[Bar]) -> str:
    """For every part the share of rows now, above that of before."""
    now, before = max(sum(b.now for b in bars), 1), max(sum(b.before for b in bars), 1)
    shown = bars[:_SHOWN_BARS]
    most = max(max(b.now / now, b.before / before) for b in shown) or 1
    height = len(shown) * (_BAR + 6)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(field)}">']
    for place, bar in enumerate(shown):
        y = place * (_BAR + 6)
        name = bar.part if len(bar.part) <= 24 else bar.part[:23] + "…"
        parts.append(f'<text x="{_LABEL - 6}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
        for kind, share, top in (("now", bar.now / now, y), ("before", bar.before / before, y + _BAR // 2)):
            width = (_WIDTH - _LABEL - 46) * share / most
            parts.append(f'<rect class="{kind}" x="{_LABEL}" y="{top}" width="{width:.1f}" height="{_BAR // 2 - 1}"/>')
        parts.append(f'<text x="{_WIDTH}" y="{y + 12}" text-anchor="end">{bar.now / now:.1%}</text>')
    more = f", the {len(shown)} most frequent of {len(bars)}" if len(bars) > len(shown) else ""
    return (
        f"<figure>{''.join(parts)}</svg><figcaption>{escape(field)}: this window (blue, in percent) and the one before"
        f" (grey){more}</figcaption></figure>"
    )
