"""The report about one generation: how it was judged, on what it is better and worse, what it still gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from accrual.page import Points, line_chart, marked, page, table, tiles
from trainer.error_slices import SliceChange
from trainer.examine import Examination
from trainer.generations import Candidate, Trial
from trainer.matrix import Matrix

_KINDS = {"promoted": "good", "rejected": "bad", "failed": "bad", "fixed": "good", "broken": "bad"}
_SHOWN_SLICES = 40
_LONGEST_TEXT = 240


def render(model: Candidate, line: Sequence[Candidate], examined: Examination | None, matrix: Matrix | None) -> str:
    """The whole page. `line`: the stream's models in order; `examined` is None for a model that was never judged."""
    run = model.run
    reason = run.reason if run else "it knows the contract only"
    body = f"""<h1>{escape(model.model)}</h1>
<p>{marked(model.state, _KINDS.get(model.state, ""))}: {escape(reason)}</p>
{_tiles(model)}
<h2>How it was judged</h2>
<p>Frozen before it was judged on these windows, of which no row had a part in it; beside the champion of the time and
generation 0, on the same rows. The gate compares the calibration error without what chance adds to it ("debiased").
Of the rows "outside" the label is none of the model's classes: each had to be wrong, and counts 13.8 of log-loss.</p>
{_trials(model.trials)}
<h2>All generations</h2>
<div class="charts">{_curve(line, "brier", "Brier score on the windows that judged (lower is better)")}
{_curve(line, "ece", "ECE there (lower is better)")}</div>
{_generations(line)}
{_examined(examined)}
{_matrix(matrix)}"""
    return page(f"Accrual: {model.model}", body)


def _tiles(model: Candidate) -> str:
    shown = [("state", model.state)]
    if model.gain is not None and model.gain_over_0 is not None:
        shown += [
            ("Brier below the champion's", f"{model.gain:+.4f}"),
            ("Brier below generation 0's", f"{model.gain_over_0:+.4f}"),
        ]
    if model.run:
        shown += [
            ("rows, new + replayed", f"{model.run.rows_new:,} + {model.run.rows_replayed:,}"),
            ("seconds", f"{model.run.seconds:,.0f}"),
        ]
        if model.watt_hours is not None:
            shown.append(("Wh, about", f"{model.watt_hours:.2g}"))
        if model.run.retention is not None:
            shown.append(("on the probe, against the base", f"{model.run.retention:+.4f}"))
    return tiles(shown)


def _trials(trials: Sequence[Trial]) -> str:
    if not trials:
        return "<p>No window has judged it.</p>"
    head = [
        "window",
        "model",
        "rows",
        "outside",
        "accuracy",
        "AUROC",
        "Brier",
        "log-loss",
        "ECE",
        "debiased",
        "coverage",
        "e-value",
    ]
    rows = [
        [
            str(e.window),
            escape(e.model) if e is trial.challenger else marked(f"{e.model} ({e.role})", "soft"),
            f"{e.rows:,}",
            "" if e.outside is None else f"{e.outside:,}",
            _between(f"{e.accuracy:.3f}", e.intervals.get("accuracy")),
            "" if e.auroc is None else _between(f"{e.auroc:.3f}", e.intervals.get("auroc")),
            _between(f"{e.brier:.4f}", e.intervals.get("brier")),
            _between(f"{e.log_loss:.4f}", e.intervals.get("log_loss")),
            _between(f"{e.ece:.4f}", e.intervals.get("ece")),
            "" if e.calibration_error is None else f"{e.calibration_error:.4f}",
            f"{e.coverage:.1%}",
            "" if e.e_value is None else f"{e.e_value:.3g}",
        ]
        for trial in trials
        for e in trial.all
    ]
    return table(head, rows, range(2, len(head)))


def _between(figure: str, interval: tuple[float, float] | None) -> str:
    """A figure with its 95% confidence interval."""
    return figure if interval is None else f"{figure} {marked(f'({interval[0]:.3f} to {interval[1]:.3f})', 'soft')}"


def _curve(line: Sequence[Candidate], field: str, title: str) -> str:
    trials = [trial for model in line for trial in model.trials]
    series: dict[str, Points] = {
        name: [(float(t.challenger.window), float(getattr(getattr(t, role), field))) for t in trials]
        for name, role in (
            ("generation 0", "generation_0"),
            ("champion", "champion"),
            ("challenger", "challenger"),
        )
    }
    return line_chart(title, series, "window")


def _generations(line: Sequence[Candidate]) -> str:
    head = ["model", "gate", "made to replace", "windows", "rows", "Brier gain", "over generation 0", "seconds"]
    rows = [
        [
            escape(model.model),
            marked(model.state, _KINDS.get(model.state, "")),
            escape(model.run.parent if model.run else ""),
            escape(ranges(model.run.windows)) if model.run else "",
            f"{model.run.rows_new + model.run.rows_replayed:,}" if model.run else "0",
            "" if model.gain is None else f"{model.gain:+.4f}",
            "" if model.gain_over_0 is None else f"{model.gain_over_0:+.4f}",
            f"{model.run.seconds:,.0f}" if model.run else "",
        ]
        for model in line
    ]
    return table(head, rows, range(4, len(head)))


def _examined(examined: Examination | None) -> str:
    if examined is None:
        return ""
    bins = {name: [(b.said, b.happened) for b in shown] for name, shown in examined.reliability.items()}
    series: dict[str, Points] = {"perfect": [(0.0, 0.0), (1.0, 1.0)], **bins}
    worst = [
        [
            escape(row.prediction_id),
            escape(row.text[:_LONGEST_TEXT]),
            escape(row.label),
            escape(row.said),
            f"{row.probability:.3f}",
            f"{row.of_label:.3f}",
        ]
        for row in examined.worst
    ]
    return f"""<h2>Reliability on its last window</h2>
<p>Of rows that were given about the same probability, how many turned out so: {escape(examined.before)} before,
{escape(examined.after)} after, {examined.rows:,} rows.</p>
<div class="charts">{line_chart("what happened, by what was said", series, "said")}</div>
<h2>What it fixed and what it broke</h2>
<p>Brier score by label, by inputs that have few values or are numbers, and by groups of texts of like meaning, before
and after. The intervals hold for all slices together (95%, Bonferroni). First those that changed for certain, then the
others, of each the worst after.</p>
{_slices(examined.slices)}
<h2>What it still gets wrong</h2>
{table(["prediction_id", "text", "label", "said", "with", "gave the label"], worst, [4, 5])}"""


def _slices(slices: Sequence[SliceChange]) -> str:
    changed = [s for s in slices if s.verdict != "undecided"]
    shown = [*changed, *(s for s in slices if s.verdict == "undecided")][:_SHOWN_SLICES]
    rows = [
        [
            escape(s.kind),
            escape(s.name),
            f"{s.rows:,}",
            f"{s.before:.3f}",
            f"{s.after:.3f}",
            f"{s.gain:+.3f} ({s.low:+.3f} to {s.high:+.3f})",
            marked(s.verdict, _KINDS.get(s.verdict, "soft")),
        ]
        for s in shown
    ]
    left = f"<p class='soft'>and {len(slices) - len(shown)} more</p>" if len(slices) > len(shown) else ""
    return table(["by", "slice", "rows", "before", "after", "gain", ""], rows, range(2, 6)) + left


def _matrix(matrix: Matrix | None) -> str:
    if matrix is None or not matrix.windows:
        return ""
    head = ["model", *(f"window {window}" for window in matrix.windows)]
    rows = [
        [
            escape(model),
            *(marked(f"{value:.3f}", "" if learned else "soft") for value, learned in zip(*two, strict=True)),
        ]
        for model, two in zip(matrix.models, zip(matrix.brier, matrix.learned, strict=True), strict=True)
    ]
    figures = [
        ("gain over generation 0", matrix.gain),
        ("backward transfer", matrix.backward_transfer),
        ("forward transfer", matrix.forward_transfer),
        ("forgetting", matrix.forgetting),
    ]
    said = [(name, "-" if value is None else f"{value:+.4f}") for name, value in figures]
    return f"""<h2>Every generation on every window</h2>
<p>Brier score on held-out rows, which no generation ever learns from ({min(matrix.rows)} to {max(matrix.rows)} a
window); grey where the generation had not learned the window.</p>
{tiles(said)}
{table(head, rows, range(1, len(head)))}"""


def ranges(numbers: Sequence[int]) -> str:
    """`1-3, 5` for 1, 2, 3 and 5; `-` for none."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "-"
