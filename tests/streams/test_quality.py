"""Live quality: tallies add up, and say what a direct computation says."""

from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accrual import scores
from accrual.events import NULL, Distribution, GroundTruth
from accrual.output import Output
from streams.monitor import Quality, exposition
from streams.quality import Tally

START = datetime(2026, 5, 1, 12, tzinfo=UTC)


def row(label: str | None, output: Distribution, *, id_: str = "p", revision: int = 1, hours: float = 0) -> GroundTruth:
    at = START + timedelta(hours=hours)
    return GroundTruth(
        prediction_id=id_,
        stream="s",
        revision=revision,
        status="labeled",
        label=label,
        model="s@1",
        predicted_at=at,
        observed_at=at + timedelta(minutes=30),
        inputs=msgspec.Raw(b"{}"),
        output=msgspec.Raw(msgspec.json.encode(output)),
        values=NULL,
        source=None,
    )


def said(a: float) -> Distribution:
    return Distribution(label="a" if a >= 0.5 else "b", probabilities={"a": a, "b": 1 - a})


rows = st.lists(st.tuples(st.sampled_from(["a", "b", "unheard of"]), st.floats(0, 1)), min_size=1, max_size=40)


@given(rows)
def test_figures_are_those_of_a_direct_computation(cases: list[tuple[str, float]]) -> None:
    tally = Tally()
    for label, a in cases:
        tally.add(row(label, said(a)), said(a))
    figures = tally.figures()
    hits = [said(a).label == label for label, a in cases]
    brier = [(a - (label == "a")) ** 2 + (1 - a - (label == "b")) ** 2 + (label == "unheard of") for label, a in cases]
    assert figures["accuracy"] == pytest.approx(sum(hits) / len(cases))
    assert figures["brier"] == pytest.approx(sum(brier) / len(cases))
    assert figures["label_delay_s"] == pytest.approx(1800)
    assert 0 <= tally.ece() <= 1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.sets(st.sampled_from("ab"))), min_size=1, max_size=30))
def test_figures_of_several_labels_are_the_trainers(cases: list[tuple[float, float, set[str]]]) -> None:
    tally, labels = Tally(), [",".join(sorted(names)) for _, _, names in cases]
    for (a, b, _), label in zip(cases, labels, strict=True):
        output = Distribution(task="multilabel", label="", probabilities={"a": a, "b": b})
        tally.add(row(label, output), output)
    said = np.array([[a, b] for a, b, _ in cases])
    truth = scores.truth_of(Output(task="multilabel", classes=["a", "b"]), labels, ["a", "b"])
    assert_same(tally, said, truth)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_figures_of_scores_are_the_trainers(cases: list[tuple[float, float]]) -> None:
    tally = Tally()
    for p, truth in cases:
        output = Distribution(task="score", label=str(p), probabilities={"score": p})
        tally.add(row(str(truth), output), output)
    assert_same(tally, np.array([[p] for p, _ in cases]), np.array([[truth] for _, truth in cases]))


def assert_same(tally: Tally, said: np.ndarray, truth: np.ndarray) -> None:
    figures = tally.figures()
    assert figures["accuracy"] == pytest.approx(scores.accuracy(said, truth))
    assert figures["brier"] == pytest.approx(scores.brier(said, truth))
    assert figures["ece"] == pytest.approx(scores.ece(said, truth))


@given(rows, rows)
def test_tallies_of_parts_add_up(left: list[tuple[str, float]], right: list[tuple[str, float]]) -> None:
    parts, whole = [Tally(), Tally()], Tally()
    for part, cases in zip(parts, (left, right), strict=True):
        for label, a in cases:
            part.add(row(label, said(a)), said(a))
            whole.add(row(label, said(a)), said(a))
    added = msgspec.convert(msgspec.to_builtins(parts[0] + parts[1]), Tally)
    assert added.figures() == pytest.approx(whole.figures())


def test_a_model_that_is_sure_and_wrong_is_badly_calibrated() -> None:
    sure, honest = Tally(), Tally()
    for number in range(100):
        label = "a" if number < 60 else "b"
        sure.add(row(label, said(1.0)), said(1.0))
        honest.add(row(label, said(0.6)), said(0.6))
    assert sure.ece() == pytest.approx(0.4)
    assert honest.ece() == pytest.approx(0.0, abs=1e-9)


class MockWindows:
    def __init__(self, table: dict[tuple[str, tuple[float, float]], list[object]], key: str) -> None:
        self.table, self.key = table, key

    def __getitem__(self, window: tuple[float, float]) -> list[object]:
        return self.table.get((self.key, window), [])

    def __setitem__(self, window: tuple[float, float], value: list[object]) -> None:
        self.table[self.key, window] = value


class MockWindowedTable:
    """Stands in for Faust's: just the ways in which `Quality` uses one."""

    def __init__(self) -> None:
        self.table: dict[tuple[str, tuple[float, float]], list[object]] = {}

    def __getitem__(self, key: str) -> MockWindows:
        return MockWindows(self.table, key)


def test_rows_count_once_by_day_and_revisions_do_not() -> None:
    quality = Quality(MockWindowedTable())
    first = row("a", said(0.9), id_="p1")
    quality.measure([first, row("b", said(0.9), id_="p2", hours=24), row(None, said(0.9), id_="p3", revision=0)], 1)
    quality.measure([first, row("b", said(0.9), id_="p1", revision=2)], 1)
    days = quality.by_day()["s"]["s@1"]
    assert {day: tally.rows for day, tally in days.items()} == {"2026-05-01": 1, "2026-05-02": 1}
    assert 'accrual_live_accuracy{stream="s",model="s@1"} 0.5' in exposition(quality.by_day())


def test_the_first_label_counts_whatever_its_revision() -> None:
    quality = Quality(MockWindowedTable())
    quality.measure([row("a", said(0.9), id_="p1", revision=3), row("b", said(0.9), id_="p1", revision=4)], 1)
    [tally] = quality.by_day()["s"]["s@1"].values()
    assert (tally.rows, tally.correct) == (1, 1)


def test_above_the_rate_rows_are_sampled_and_all_are_seen() -> None:
    quality = Quality(MockWindowedTable())
    quality.measure([row("a", said(0.9), id_=str(number)) for number in range(100)], 4)
    [tally] = quality.by_day()["s"]["s@1"].values()
    assert (tally.seen, tally.rows) == (100, 25)


def test_an_output_of_another_form_is_seen_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    quality = Quality(MockWindowedTable())
    own_form = msgspec.structs.replace(row("a", said(0.9), id_="p1"), output=msgspec.Raw(b'{"answer":"a"}'))
    no_score = row("a", Distribution(task="score", label="0.5", probabilities={"score": 0.5}), id_="p2")
    quality.measure([own_form, no_score, row("a", said(0.9), id_="p3")], 1)
    figures = quality.by_day()["s"]["s@1"]["2026-05-01"].figures()
    assert (figures["seen"], figures["rows"]) == (3, 1)
    assert "2 rows are not measured" in caplog.text
