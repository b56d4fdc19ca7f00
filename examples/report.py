"""The demo's report, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape

from accrual.page import Points, line_chart, marked, page, table, tiles
from examples.figures import NAMES, Figures, Scores, Trial
from examples.table import VERDICTS

_KINDS = {"promote": "good", "reject": "bad", "wait": ""}


def render(figures: Figures) -> str:
    """The whole page."""
    measure = NAMES[figures.measure]
    trials = figures.findings.trials
    body = f"""<h1>{escape(figures.stream)}</h1>
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
{_trials_table(figures)}
<h2>In service</h2>
<p>What the service's own predictions turned out to be worth, in the order in which they were made; a dashed line is a
change of champion.</p>
<div class="charts">{_live_chart(figures, "accuracy", "accuracy of predictions in service")}
{_live_chart(figures, "brier", "Brier score of predictions in service")}</div>
<h2>Windows</h2>
{_windows_table(figures)}
<h2>The books</h2>
{_books(figures)}
<h2>The lake</h2>
<p>Any DuckDB with the DuckLake extension reads it; so does</p><pre>{escape(figures.sql_example)}</pre>"""
    return page(f"Accrual: {figures.stream}", body)


def _tiles(figures: Figures) -> str:
    last = figures.findings.last
    shown = [("champion", figures.findings.champion), ("windows sealed", str(len(figures.findings.windows)))]
    shown.append(("predictions", f"{sum(figures.findings.served.values()):,}"))
    if last is not None:
        shown += [
            (f"Brier on window {last.window}", f"{last.champion.brier:.3f}"),
            ("generation 0 there", f"{last.generation_0.brier:.3f}"),
        ]
    shown.append(("audit", "balances" if figures.balances else "DIFFERS"))
    return tiles(shown)


def _trial_chart(trials: Sequence[Trial], field: str, title: str) -> str:
    def points(of: Sequence[tuple[int, Scores]]) -> Points:
        return [(window, value) for window, scores in of if (value := getattr(scores, field)) is not None]

    series = {
        "generation 0": points([(t.window, t.generation_0) for t in trials]),
        "champion": points([(t.window, t.champion) for t in trials]),
        "challenger": points([(t.window, t.challenger) for t in trials]),
    }
    return line_chart(title, series, "window")


def _live_chart(figures: Figures, field: str, title: str) -> str:
    points = [(s.first + s.predictions / 2, getattr(s, field)) for s in figures.findings.live]
    changes = [
        (float(after.first), after.model.rpartition("@")[2])
        for before, after in zip(figures.findings.live, figures.findings.live[1:], strict=False)
        if after.model != before.model
    ]
    marks = [(x, f"@{name}") for x, name in changes]
    return line_chart(title, {"": [], "in service": points}, "labeled prediction", marks)


def _trials_table(figures: Figures) -> str:
    measure = NAMES[figures.measure]
    rows = [
        [
            trial.challenger.model.rpartition("@")[2],
            marked(VERDICTS[trial.verdict], _KINDS[trial.verdict]),
            f"{trial.rows_new:,} + {trial.rows_replayed:,}",
            f"window {trial.window}",
            *(_beside(trial, field) for field in (figures.measure, "brier", "log_loss", "ece")),
            f"{trial.e_value:.3g}",
        ]
        for trial in figures.findings.trials
    ]
    head = ["generation", "gate", "trained on", "judged on", measure, "Brier", "log-loss", "ECE", "e-value"]
    return table(head, rows, range(2, len(head)))


def _beside(trial: Trial, field: str) -> str:
    own, first, champion = (getattr(s, field) for s in (trial.challenger, trial.generation_0, trial.champion))
    said = ["-" if value is None else f"{value:.3f}" for value in (own, first, champion)]  # a constant ranks nothing
    return f"{said[0]} {marked(f'({said[1]} | {said[2]})', 'soft')}"


def _windows_table(figures: Figures) -> str:
    rows = [
        [
            str(w.window),
            f"{w.rows:,}",
            f"{w.labeled:,}",
            f"{w.coverage:.1%}",
            "the beginning" if w.window == 1 else _minute(w.from_time),
            _minute(w.to_time),
        ]
        for w in figures.findings.windows
    ]
    return table(["window", "predictions", "labeled", "coverage", "from", "to"], rows, range(1, 6))


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _books(figures: Figures) -> str:
    rows = [[escape(name), f"{count:,}"] for name, count in figures.books.items()]
    verdict = "no difference" if figures.balances else "DIFFERENCES: see <code>accrual audit</code>"
    return (
        f"<p>The audit recomputed the join in SQL from the raw events and compared: {verdict}.</p>"
        f"{table(['', 'predictions'], rows, [1])}"
    )
