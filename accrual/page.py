"""Pages for people: one HTML file with its charts as inline SVG; nothing is fetched, light and dark.

What is given as HTML must be escaped by who gives it; names and titles are escaped here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 34
_MOST_TICKS = 14

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6675; --paper: #fbfaf7; --line: #d9d6cd;
  --s0: #8a8f98; --s1: #1f6fb2; --s2: #c8622d; --s3: #7a4fb0; --good: #1d7a46; --doubt: #a06a00; --bad: #a8322d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ee; --soft: #9aa3b2; --paper: #14171d; --line: #343a46;
  --s0: #8d95a3; --s1: #6db3f2; --s2: #f0955f; --s3: #b99af0; --good: #5fcf8f; --doubt: #e5b45a; --bad: #f08a84; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 76rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { max-width: 46rem; } .soft, figcaption, th { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figcaption { font-size: .85rem; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } .grid { stroke: var(--line); }
.mark { stroke: var(--soft); stroke-dasharray: 2 4; }
.s0 { stroke: var(--s0); fill: var(--s0); } .s1 { stroke: var(--s1); fill: var(--s1); }
.s2 { stroke: var(--s2); fill: var(--s2); } .s3 { stroke: var(--s3); fill: var(--s3); }
polyline { fill: none !important; stroke-width: 2; } rect { stroke: none !important; }
svg text.s0, svg text.s1, svg text.s2, svg text.s3 { stroke: none; }
.scroll { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; font-size: .85rem; white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); font-weight: 600; } .doubt { color: var(--doubt); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
code, pre { font: 13px ui-monospace, monospace; } pre { overflow-x: auto; border: 1px solid var(--line);
  border-radius: 8px; padding: .75rem; }
"""


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
{body}
</body></html>
"""


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """The few figures that matter most, as (name, value)."""
    boxes = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in shown)
    return f'<div class="tiles">{boxes}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table that scrolls when it is wide; cells are HTML, and those of the columns `numbers` stand to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        shown = (
            f"<{tag}{' class=number' if place in numbers else ''}>{cell}</{tag}>" for place, cell in enumerate(cells)
        )
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", cells) for cells in rows)
    names = line("th", [escape(name) for name in head])
    return f'<div class="scroll"><table><thead>{names}</thead><tbody>{body}</tbody></table></div>'


def marked(text: str, kind: str) -> str:
    """Text in the colour of its `kind`: good, doubt, bad or soft."""
    return f'<span class="{kind}">{escape(text)}</span>' if kind else escape(text)


def line_chart(title: str, series: Mapping[str, Points], x_title: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Lines over a common x, at most four; the colour of a line is its place in `series`. `marks` are moments of x."""
    every = [point for points in series.values() for point in points]
    if not every:
        return f"<figure><figcaption>{escape(title)}: nothing to show</figcaption></figure>"
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
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
    ticks = sorted(set(xs))
    if len(ticks) > _MOST_TICKS:
        ticks = [x_low + (x_high - x_low) * n / 5 for n in range(6)]
    decimals = 0 if x_high - x_low >= 5 or all(float(x).is_integer() for x in ticks) else 2
    for x in ticks:
        anchor = "end" if x == ticks[-1] else "middle"
        parts += [f'<text x="{across(x):.1f}" y="{_HEIGHT - 18}" text-anchor="{anchor}">{x:,.{decimals}f}</text>']
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
