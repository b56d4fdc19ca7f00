"""The page about a window: self-contained, whole in a real browser, and harmless whatever the rows say."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from consumers.quality import Bar, Finding, Report
from consumers.quality_report import render

NASTY = "<script>document.title = 'gone'</script>"


def report() -> Report:
    at = datetime(2026, 1, 5, tzinfo=UTC)
    findings = [
        Finding("psi", "grade", "", 0.31, "at most 0.25", "failed"),
        Finding("psi", "amount", "", 0.26, "at most 0.25", "warn"),
        Finding("duplicates", "", "", 0.01, "", "measured"),
    ]
    broken = [
        {"prediction_id": f"p-{n}", "revision": 1, "rule": "pii", "detail": NASTY, "severity": "quarantine"}
        for n in range(130)
    ]
    bars = [Bar("grade", part, n + 1, 9 - n) for n, part in enumerate("ABCDEFG")]
    bars += [Bar("label", f"class {n}", n, 30 - n) for n in range(30)]
    near = [{"text": NASTY, "like_text": "b", "similarity": 0.9}]
    return Report("loans", 3, at, at, 1000, 870, findings, broken, bars, [], near)


def test_nothing_is_fetched_and_nothing_of_the_rows_is_markup() -> None:
    page = render(report())
    assert not re.search(r"(src|href)\s*=|@import|url\(|<script", page)
    assert page.count("<svg") == 2 and "the 20 most frequent of 30" in page
    assert "1 metrics are beyond a bound: the window is not sealed" in page and "and 30 more" in page
    fine = msgspec.structs.replace(report(), findings=[], broken=[], bars=[], near=[])
    assert "within all bounds" in render(fine) and "<svg" not in render(fine)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_shows_all_of_it(tmp_path: Path) -> None:
    page = tmp_path / "window.html"
    page.write_text(render(report()))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "<title>Quality of loans, window 3</title>" in shown
    assert shown.count("<rect") == 2 * (7 + 20) and shown.count("<tr>") == 3 + 100 + 1 + 3
