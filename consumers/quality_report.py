"""The quality of one window, as one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import Any

from accrual.page import marked, page, table
from consumers.quality import Bar, Finding, Report

_SHOWN_BARS = 20
_SHOWN_ROWS = 100
_WIDTH, _BAR, _LABEL = 460, 16, 150

_KINDS = {"failed": "bad", "warn": "doubt", "ok": "good", "measured": ""}
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
    body = f"""<h1>{escape(title)}</h1>
<p class="soft">Predictions from {report.since:%Y-%m-%d %H:%M} up to {report.until:%Y-%m-%d %H:%M} UTC:
{report.rows:,} rows, of which {report.rows - report.kept:,} are in quarantine or rejected.</p>
<p>{marked(said, _KINDS[verdict])}</p>
<h2>Metrics</h2>
{table(["metric", "of", "value", "bound", "verdict"], map(_metric, findings), [2])}
<h2>Rows that break a rule</h2>
{_broken(report.broken)}
<h2>Against the window before</h2>
{_charts(report.bars)}
<h2>Labels that the predictions contradict</h2>
<p>Suspects, not errors: the likelier label is what the model was confident of before the label was known.</p>
{_some(report.suspected, ["prediction_id", "label", "likelier", "probability"])}
<h2>Texts that are nearly the same</h2>
{_some(report.near, ["text", "like_text", "similarity"])}"""
    return page(f"Quality of {title}", body)


def _metric(finding: Finding) -> list[str]:
    return [
        escape(finding.metric),
        escape(" ".join(part for part in (finding.field, finding.part) if part)),
        f"{finding.value:g}",
        escape(finding.bound),
        marked(finding.verdict, _KINDS[finding.verdict]),
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
    cells = ([escape(str(row[name])) for name in columns] for row in rows[:_SHOWN_ROWS])
    more = f"<p class='soft'>and {len(rows) - _SHOWN_ROWS:,} more</p>" if len(rows) > _SHOWN_ROWS else ""
    return f"{table([name.replace('_', ' ') for name in columns], cells)}{more}"


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
        for kind, share, top in (("s1", bar.now / now, y), ("s0", bar.before / before, y + _BAR // 2)):
            width = (_WIDTH - _LABEL - 46) * share / most
            parts.append(f'<rect class="{kind}" x="{_LABEL}" y="{top}" width="{width:.1f}" height="{_BAR // 2 - 1}"/>')
        parts.append(f'<text x="{_WIDTH}" y="{y + 12}" text-anchor="end">{bar.now / now:.1%}</text>')
    more = f", the {len(shown)} most frequent of {len(bars)}" if len(bars) > len(shown) else ""
    return (
        f"<figure>{''.join(parts)}</svg><figcaption>{escape(field)}: this window (blue, in percent) and the one before"
        f" (grey){more}</figcaption></figure>"
    )
