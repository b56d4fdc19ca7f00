"""The demo's report: one HTML file with its curves as inline SVG; nothing is fetched, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape

from examples.figures import Figures, Scores, Trial
from examples.table import VERDICTS

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 34

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6675; --paper: #fbfaf7; --line: #d9d6cd;
  --s0: #8a8f98; --s1: #1f6fb2; --s2: #c8622d; --good: #1d7a46; --bad: #a8322d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #9aa3b2; --paper: #14171d; --line: #343a46;
  --s0: #8d95a3; --s1: #6db3f2; --s2: #f0955f; --good: #5fcf8f; --bad: #f08a84; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { max-width: 46rem; } .soft, figcaption, th { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figcaption { font-size: .85rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } .grid { stroke: var(--line); }
.mark { stroke: var(--soft); stroke-dasharray: 2 4; }
.s0 { stroke: var(--s0); fill: var(--s0); } .s1 { stroke: var(--s1); fill: var(--s1); }
.s2 { stroke: var(--s2); fill: var(--s2); } polyline { fill: none !important; stroke-width: 2; }
svg text.s0, svg text.s1, svg text.s2 { stroke: none; }
svg text.s0 { fill: var(--s0); } svg text.s1 { fill: var(--s1); } svg text.s2 { fill: var(--s2); }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; font-size: .85rem; } th:first-child, td:first-child { text-align: left; }
.promote { color: var(--good); font-weight: 600; } .reject { color: var(--bad); font-weight: 600; }
code, pre { font: 13px ui-monospace, monospace; } pre { overflow-x: auto; border: 1px solid var(--line);
  border-radius: 8px; padding: .75rem; }
"""


def render(figures: Figures) -> str:
    """The whole page."""
    measure = "AUROC" if figures.two_classes else "accuracy"
    trials = figures.findings.trials
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Accrual: {escape(figures.stream)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(figures.stream)}</h1>
<p class="soft">{figures.rows:,} rows ({figures.share:.0%} of the data, seed {figures.seed}); the run took
{figures.seconds / 60:.1f} minutes. Every figure is read from the lake.</p>
{_tiles(figures)}
<h2>Each generation on a window that it had not seen</h2>
<p>A challenger is frozen, then judged on the next sealed window beside the champion and generation 0, which is what was
known before the first label. The gate decides on the paired Brier scores; one that loses is not published.
In the table: the rows it was trained on, new + replayed; its figure, then those of (generation 0 | the champion of the
time).</p>
<div class="charts">{_trial_chart(trials, "brier", "Brier score (lower is better)")}
{_trial_chart(trials, figures.measure, f"{measure} (higher is better)")}</div>
<div class="scroll">{_trials_table(figures)}</div>
<h2>In service</h2>
<p>What the service's own predictions turned out to be worth, in the order in which they were made; a dashed line is a
change of champion.</p>
<div class="charts">{_live_chart(figures, "accuracy", "accuracy of predictions in service")}
{_live_chart(figures, "brier", "Brier score of predictions in service")}</div>
<h2>Windows</h2>
<div class="scroll">{_windows_table(figures)}</div>
<h2>The books</h2>
{_books(figures)}
<h2>The lake</h2>
<p>Any DuckDB with the DuckLake extension reads it; so does</p><pre>{escape(figures.sql_example)}</pre>
</body></html>
"""


def _tiles(figures: Figures) -> str:
    last = figures.findings.last
    tiles = [("champion", figures.findings.champion), ("windows sealed", str(len(figures.findings.windows)))]
    tiles.append(("predictions", f"{sum(figures.findings.served.values()):,}"))
    if last is not None:
        tiles += [
            (f"Brier on window {last.window}", f"{last.champion.brier:.3f}"),
            ("generation 0 there", f"{last.generation_0.brier:.3f}"),
        ]
    tiles.append(("audit", "balances" if figures.balances else "DIFFERS"))
    shown = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in tiles)
    return f'<div class="tiles">{shown}</div>'


def _trial_chart(trials: Sequence[Trial], field: str, title: str) -> str:
    def points(of: Sequence[tuple[int, Scores]]) -> Points:
        return [(window, value) for window, scores in of if (value := getattr(scores, field)) is not None]

    series = {
        "generation 0": points([(t.window, t.generation_0) for t in trials]),
        "champion": points([(t.window, t.champion) for t in trials]),
        "challenger": points([(t.window, t.challenger) for t in trials]),
    }
    return _chart(title, series, "window", marks=[])


def _live_chart(figures: Figures, field: str, title: str) -> str:
    points = [(s.first + s.predictions / 2, getattr(s, field)) for s in figures.findings.live]
    changes = [
        (float(after.first), after.model.rpartition("@")[2])
        for before, after in zip(figures.findings.live, figures.findings.live[1:], strict=False)
        if after.model != before.model
    ]
    return _chart(title, {"": [], "in service": points}, "labeled prediction", [(x, f"@{name}") for x, name in changes])


def _chart(title: str, series: Mapping[str, Points], x_title: str, marks: Sequence[tuple[float, str]]) -> str:
    """Lines over a common x; the class of a line is its place in `series`."""
    every = [point for points in series.values() for point in points]
    if not every:
        return f"<figure><figcaption>{escape(title)}: nothing to show</figcaption></figure>"
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    pad = (max(ys) - min(ys)) * 0.08 or 0.05
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for step in range(5):
        y = y_low + (y_high - y_low) * step / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.3f}</text>')
    for x, name in marks:
        parts.append(
            f'<line class="mark" x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{_TOP}" y2="{down(y_low):.1f}"/>'
        )
        parts.append(f'<text x="{across(x) + 3:.1f}" y="{_TOP + 10}">{escape(name)}</text>')
    ticks = sorted(set(xs)) if len(set(xs)) <= 14 else [x_low + (x_high - x_low) * n / 5 for n in range(6)]
    for x in ticks:
        anchor = "end" if x == ticks[-1] else "middle"
        parts += [f'<text x="{across(x):.1f}" y="{_HEIGHT - 18}" text-anchor="{anchor}">{x:,.0f}</text>']
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_title)}</text>')
    legend = float(_LEFT)
    for place, (name, points) in enumerate(series.items()):
        if not points:
            continue
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="s{place}" points="{path}"/>')
        parts += [f'<circle class="s{place}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3"/>' for x, y in points]
        parts.append(f'<text class="s{place}" x="{legend:.0f}" y="{_HEIGHT - 3}">{escape(name)}</text>')
        legend += 14 + 7 * len(name)
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def _trials_table(figures: Figures) -> str:
    measure = "AUROC" if figures.two_classes else "accuracy"
    rows = []
    for trial in figures.findings.trials:
        cells = [
            trial.challenger.model.rpartition("@")[2],
            f'<span class="{trial.verdict}">{VERDICTS[trial.verdict]}</span>',
            f"{trial.rows_new:,} + {trial.rows_replayed:,}",
            f"window {trial.window}",
            *(_beside(trial, field) for field in (figures.measure, "brier", "log_loss", "ece")),
            f"{trial.e_value:.3g}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = ["generation", "gate", "trained on", "judged on", measure, "Brier", "log-loss", "ECE", "e-value"]
    return _table(head, rows)


def _beside(trial: Trial, field: str) -> str:
    own, first, champion = (getattr(s, field) for s in (trial.challenger, trial.generation_0, trial.champion))
    return "" if own is None else f'{own:.3f} <span class="soft">({first:.3f} | {champion:.3f})</span>'


def _windows_table(figures: Figures) -> str:
    rows = [
        f"<tr><td>{w.window}</td><td>{w.rows:,}</td><td>{w.labeled:,}</td><td>{w.coverage:.1%}</td>"
        f"<td>{'the beginning' if w.window == 1 else _minute(w.from_time)}</td><td>{_minute(w.to_time)}</td></tr>"
        for w in figures.findings.windows
    ]
    return _table(["window", "predictions", "labeled", "coverage", "from", "to"], rows)


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _books(figures: Figures) -> str:
    rows = [f"<tr><td>{escape(name)}</td><td>{count:,}</td></tr>" for name, count in figures.books.items()]
    verdict = "no difference" if figures.balances else "DIFFERENCES: see <code>accrual audit</code>"
    return f"<p>The audit recomputed the join in SQL from the raw events and compared: {verdict}.</p>" + _table(
        ["", "predictions"], rows
    )


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
