"""The table of generations that the demo prints."""

from __future__ import annotations

from rich import box
from rich.table import Table

from examples.figures import NAMES, Figures, Scores

VERDICTS = {"promote": "promoted", "reject": "rejected", "wait": "waits"}
_STYLES = {"promote": "green", "reject": "red", "wait": "dim"}


def trials_table(figures: Figures) -> Table:
    """Each challenger on a window it had not seen; under it the champion of the time and generation 0, on the same."""
    measure = NAMES[figures.measure]
    table = Table(title="Every challenger on the next window", title_justify="left", header_style="dim", box=box.SIMPLE)
    table.pad_edge, table.collapse_padding = False, True  # 80 columns are enough
    for name in ("window", "model", "trained on", measure, "Brier", "log-loss", "ECE", "gate"):
        table.add_column(name, justify="left" if name in ("model", "gate") else "right", no_wrap=True)
    for trial in figures.findings.trials:
        table.add_row(
            str(trial.window),
            f"generation {_version(trial.challenger)}",
            f"{trial.rows_new:,} + {trial.rows_replayed:,}",
            *_cells(trial.challenger, figures.measure),
            f"[{_STYLES[trial.verdict]}]{VERDICTS[trial.verdict]}[/]",
        )
        if trial.champion.model != trial.generation_0.model:
            table.add_row(
                "", f"  champion {_version(trial.champion)}", "", *_cells(trial.champion, figures.measure), ""
            )
        table.add_row("", "  generation 0", "", *_cells(trial.generation_0, figures.measure), "", end_section=True)
    return table


def _version(scores: Scores) -> str:
    return scores.model.rpartition("@")[2]


def _cells(scores: Scores, measure: str) -> list[str]:
    values = [getattr(scores, field) for field in (measure, "brier", "log_loss", "ece")]
    return ["-" if value is None else f"{value:.3f}" for value in values]
