"""The report: self-contained, and true to the figures it is given."""

import re
from datetime import UTC, datetime

import msgspec
import pytest
from rich.console import Console

from examples.figures import Figures, Findings, Last, Scores, Stretch, Trial, Window
from examples.report import render
from examples.table import trials_table


def scores(model: str, accuracy: float, brier: float) -> Scores:
    return Scores(
        model=model,
        rows=980,
        accuracy=accuracy,
        auroc=None,
        rank_correlation=None,
        brier=brier,
        log_loss=brier * 2,
        ece=0.04,
    )


def figures() -> Figures:
    first = [scores("s@0", 0.62 + 0.004 * n, 0.52 - 0.004 * n) for n in range(6)]
    rising = [scores(f"s@{n + 1}", 0.74 + 0.02 * n, 0.38 - 0.02 * n) for n in range(6)]
    trials = [
        Trial(
            window=n + 2,
            challenger=rising[n],
            champion=first[n] if n == 0 else rising[n - 1],
            generation_0=first[n],
            windows=list(range(1, n + 2)),
            rows_new=980,
            rows_replayed=490 * min(n, 1),
            e_value=[40.0, 0.2, 22.5, 3.1, 55.0, 1.0][n],
            verdict=("promote", "reject", "promote", "wait", "promote", "reject")[n],
            coverage=0.98,
        )
        for n in range(6)
    ]
    start = datetime(2026, 1, 5, tzinfo=UTC)
    windows = [
        Window(window=n + 1, rows=1000, labeled=980, coverage=0.98, from_time=start, to_time=start) for n in range(7)
    ]
    live = [
        Stretch(first=n * 300, predictions=300, model=f"s@{n // 8}", accuracy=0.6 + n * 0.006, brier=0.55 - n * 0.006)
        for n in range(40)
    ]
    findings = Findings(
        champion="s@5",
        generations=["s@0", "s@1", "s@3", "s@5"],
        trials=trials,
        windows=windows,
        live=live,
        served={"s@0": 3000, "s@1": 5000, "s@5": 5083},
        last=Last(7, trials[-1].champion, trials[-1].generation_0),
    )
    return Figures(
        stream="s",
        rows=13_083,
        share=1.0,
        seed=7,
        measure="accuracy",
        seconds=290.0,
        lake="sqlite:/tmp/lake.sqlite",
        sql_example='accrual sql "select 1 < 2"',
        restarts={"join": 0},
        balances=True,
        books={"captured": 13_083, "labeled": 12_700, "expired": 200, "pending": 183},
        findings=findings,
    )


def test_nothing_is_fetched_and_every_trial_is_in_it() -> None:
    page = render(figures())
    assert not re.search(r"(src|href)\s*=|@import|url\(|<script", page)
    assert page.count("<svg") == 4
    for verdict, count in {"promoted": 3, "rejected": 2, "waits": 1}.items():
        assert len(re.findall(rf">{verdict}(</span>|</td>)", page)) == count, "a loss is shown as a loss"
    assert "0.380" in page and "select 1 &lt; 2" in page and "balances" in page


def test_books_that_differ_are_not_hidden() -> None:
    page = render(msgspec.structs.replace(figures(), balances=False))
    assert "DIFFER" in page


def test_a_run_without_a_trial_still_has_a_report() -> None:
    empty = Findings(champion="s@0", generations=["s@0"], trials=[], windows=[], live=[], served={}, last=None)
    assert "nothing to show" in render(msgspec.structs.replace(figures(), findings=empty))


@pytest.mark.parametrize("two_classes", [True, False])
def test_the_table_shows_each_challenger_beside_its_rivals(two_classes: bool) -> None:
    console = Console(width=80, record=True)
    console.print(trials_table(msgspec.structs.replace(figures(), measure="auroc" if two_classes else "accuracy")))
    rows = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert ("AUROC" in rows[1]) is two_classes
    first = "-" if two_classes else "0.740"
    assert ["2", "generation", "1", "980", "+", "0", first, "0.380", "0.760", "0.040", "promoted"] in rows
    assert ["generation", "0", "-" if two_classes else "0.624", "0.516", "1.032", "0.040"] in rows
    assert ["champion", "1", "-" if two_classes else "0.740", "0.380", "0.760", "0.040"] in rows


def test_figures_survive_json() -> None:
    made = figures()
    assert msgspec.json.decode(msgspec.json.encode(made), type=Figures) == made


def test_a_constant_that_ranks_nothing_is_shown_as_such() -> None:
    found = figures()
    trials = [
        msgspec.structs.replace(
            trial,
            challenger=msgspec.structs.replace(trial.challenger, rank_correlation=0.8),
            champion=trial.generation_0,
        )
        for trial in found.findings.trials
    ]
    findings = msgspec.structs.replace(found.findings, trials=trials)
    shown = msgspec.structs.replace(found, measure="rank_correlation", findings=findings)
    page = render(shown)
    assert "rank corr." in page and "0.800" in page and "(- | -)" in page
