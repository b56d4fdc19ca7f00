"""Rows on a terminal: none of them is cut, and none is folded letter by letter."""

from __future__ import annotations

import json

import pytest

from accrual.commands.rows import Format, print_rows

ROWS = [{"model": f"support-intents@{n}", "state": "in service", "gain": 0.3268, "why": "x" * 60} for n in (1, 2)]
COLUMNS = ["model", "gain", "state", "why"]


@pytest.mark.parametrize(("width", "by_row"), [("60", True), ("90", False), ("300", False)])
def test_a_table_that_is_too_wide_is_told_row_by_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str, by_row: bool
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    print_rows(Format.TABLE, COLUMNS, ROWS, "a caption")
    said = capsys.readouterr().out
    assert "support-intents@1" in said and "in service" in said and "a caption" in said
    assert ("\nmodel" in said) == by_row
    assert said.count("x") == 120


def test_what_is_written_to_a_file_is_as_wide_as_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_rows(Format.TABLE, COLUMNS, ROWS)
    assert capsys.readouterr().out.count("x" * 60) == 2


def test_columns_are_in_the_order_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(Format.CSV, COLUMNS, ROWS)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert (first, second) == ("model,gain,state,why", f"support-intents@1,0.3268,in service,{'x' * 60}")
    print_rows(Format.JSON, COLUMNS, ROWS)
    assert json.loads(capsys.readouterr().out) == ROWS
