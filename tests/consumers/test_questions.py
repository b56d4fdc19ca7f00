"""What analysts ask: the views, the questions of docs/analysts.md, exports, the shell. Asking stops no writer."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from accrual import scores
from accrual.cli import app
from accrual.config import Config, Lake, Topics
from accrual.events import Distribution, GroundTruth, Outcome, Prediction, encode
from accrual.lake import WritableLake, open_lake, open_lake_for_writing
from accrual.lake_tables import TABLES, VIEWS
from accrual.lake_views import QUESTIONS
from consumers.typed_views import make_typed_views
from tests.consumers.conftest import START, World

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "analysts.md").read_text(encoding="utf-8")
INTENTS = ["card_arrival", "card_linking", "exchange_rate"]
DAYS = 6


class Desk(World):
    """Two streams by the contracts that ship, a few days of each: two versions, revisions, expired and pending ones."""

    def fill(self) -> None:
        chance = random.Random(5)
        for n in range(DAYS * 48):
            version = int(n >= DAYS * 24)
            truth = chance.choice(INTENTS if n < DAYS * 24 else INTENTS[1:])
            sure = chance.uniform(0.4, 1)
            said = truth if chance.random() < sure else chance.choice(INTENTS)
            p = self.said("support-intents", version, n, said, sure, INTENTS, {"text": f"question {n}"})
            if n % 10 == 0:
                if n < DAYS * 40:
                    self.send(self.truth(p, None, None, 0))
                continue
            hours = timedelta(hours=chance.expovariate(1 / 3))
            self.happened(p, [(hours, {"intent": truth})], truth)
            if n % 25 == 1:
                other = next(i for i in INTENTS if i != truth)
                self.happened(p, [(hours + timedelta(days=1), {"intent": other})], other, revision=2)
        for n in range(100):
            grade = chance.choice("ABCD")
            risk = {"A": 0.02, "B": 0.05, "C": 0.15, "D": 0.4}[grade]
            lost = chance.random() < risk
            inputs = {"amount": 1000.0 * (n + 1), "term_months": 36, "interest_rate": 0.1, "grade": grade}
            inputs |= {"purpose": "car", "home_ownership": "RENT"}
            p = self.said("credit-risk", 0, n, "paid", 1 - risk, ["paid", "charged_off"], inputs)
            if lost:
                self.happened(p, [(timedelta(days=90), {"status": "Charged Off"})], "charged_off")
            else:
                self.send(self.truth(p, None, "paid", 0))

    def said(
        self, stream: str, version: int, n: int, label: str, sure: float, classes: list[str], inputs: dict[str, Any]
    ) -> Prediction:
        rest = (1 - sure) / (len(classes) - 1)
        output = Distribution(label=label, probabilities={c: sure if c == label else rest for c in classes})
        p = Prediction(
            prediction_id=f"{stream}-{n:04}",
            stream=stream,
            model=f"{stream}@{version}",
            predicted_at=START + timedelta(minutes=30 * n),
            inputs=msgspec.Raw(encode(inputs)),
            output=msgspec.Raw(encode(output)),
        )
        self.send(p)
        return p

    def happened(
        self, p: Prediction, outcomes: list[tuple[timedelta, dict[str, Any]]], label: str, revision: int = 1
    ) -> None:
        for after, values in outcomes:
            o = Outcome(
                prediction_id=p.prediction_id,
                stream=p.stream,
                observed_at=p.predicted_at + after,
                values=msgspec.Raw(encode(values)),
            )
            self.send(o)
            self.send(self.truth(p, o, label, revision))

    def truth(self, p: Prediction, o: Outcome | None, label: str | None, revision: int) -> GroundTruth:
        return msgspec.structs.replace(
            super().ground_truth(p, None),
            status="labeled" if o else "expired",
            label=label,
            revision=revision,
            **({"observed_at": o.observed_at, "values": o.values, "source": o.source} if o else {}),
        )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A lake that analysts ask, with a window and a generation of support-intents."""
    state = tmp_path_factory.mktemp("desk")
    config = Config(
        topics=Topics(prefix="desk", partitions=2), state=str(state), contracts=str(ROOT / "schemas/contracts")
    )
    world = Desk(config)
    with open_lake_for_writing(config) as lake:
        make_typed_views(lake, world.contracts)
        world.fill()
        world.pour(lake)
        window = {"stream": "support-intents", "window": 1, "snapshot_id": lake.snapshot_id(), "from_time": START}
        window |= {"to_time": START + timedelta(days=2), "rows": 96, "labeled": 86, "sealed_at": datetime.now(UTC)}
        generation = {
            "stream": "support-intents",
            "version": 1,
            "model": "support-intents@1",
            "windows": [1],
            "rows": 86,
        }
        lake.append(
            {
                "windows": pa.Table.from_pylist([window], TABLES["windows"]),
                "generations": pa.Table.from_pylist([generation], TABLES["generations"]),
            }
        )
    return config


@pytest.fixture
def lake(config: Config) -> Iterator[Any]:
    """The same lake, to be asked."""
    with open_lake(config) as opened:
        yield opened


@pytest.fixture
def accrual(config: Config, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command on it; returns what it printed."""
    for name, value in config.environment().items():
        monkeypatch.setenv(name, value)

    def run(*words: str, exit_code: int = 0) -> str:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == exit_code, done.output
        return str(done.exception) if exit_code == 1 else done.output

    return run


def judged(lake: Any, model: str) -> tuple[Any, Any]:
    """Probabilities and the index of the label, computed without the views."""
    rows = lake.rows("select output, label from ground_truth where model = ? and label is not null", [model])
    said = [msgspec.json.decode(row["output"])["probabilities"] for row in rows]
    return np.array([[p[c] for c in INTENTS] for p in said]), np.array([INTENTS.index(row["label"]) for row in rows])


@pytest.mark.parametrize("version", [0, 1])
def test_accuracy_and_calibration_are_those_of_the_trainer(lake: Any, version: int) -> None:
    probabilities, truth = judged(lake, f"support-intents@{version}")
    [found] = lake.rows("from accuracy_by_version where model = ?", [f"support-intents@{version}"])
    assert found["accuracy"] == pytest.approx(scores.accuracy(probabilities, truth))
    assert found["brier"] == pytest.approx(scores.brier(probabilities, truth))
    assert (found["predictions"], found["labeled"]) == (DAYS * 24, len(truth))
    bins = lake.rows("from calibration_by_version where model = ?", [f"support-intents@{version}"])
    assert [row["ece"] for row in bins] == pytest.approx([scores.ece(probabilities, truth)] * len(bins))
    assert sum(row["labeled"] for row in bins) == len(truth)
    assert all(row["from"] <= row["confidence"] <= row["to"] for row in bins)


def test_a_version_without_labels_has_its_line(lake: Any) -> None:
    models = {row["model"] for row in lake.rows("select distinct model from predictions")}
    assert {row["model"] for row in lake.rows("from accuracy_by_version")} == models


def test_label_delay_is_that_of_the_first_label(lake: Any) -> None:
    rows = lake.rows("from label_delay where stream = 'support-intents' and day = '2025-01-01'")
    first = lake.rows(
        "select min(observed_at) as seen, predicted_at from ground_truth_history where stream = 'support-intents'"
        " and status = 'labeled' and day = '2025-01-01' group by prediction_id, predicted_at"
    )
    delays = sorted(row["seen"] - row["predicted_at"] for row in first)
    assert [row["labeled"] for row in rows] == [len(delays)]
    hours = [delay / timedelta(hours=1) for delay in delays]
    assert rows[0]["p50_hours"] == pytest.approx(np.median(hours))
    assert rows[0]["max_hours"] == pytest.approx(hours[-1])


def test_pending_is_counted_once_and_by_age_in_event_time(lake: Any) -> None:
    rows = lake.rows("from pending_by_age")
    assert {row["stream"] for row in rows} == {"support-intents"}
    assert sum(row["pending"] for row in rows) == len(range(DAYS * 40, DAYS * 48, 10))
    reached = lake.rows("select max(observed_at) as t from outcomes where stream = 'support-intents'")[0]["t"]
    assert all(reached - row["oldest"] >= timedelta(hours=row["older_than_hours"]) for row in rows)
    assert min(row["oldest"] for row in rows) == START + timedelta(minutes=30 * DAYS * 40)


def test_drift_is_small_where_nothing_changed_and_large_where_a_class_went(lake: Any) -> None:
    rows = lake.rows("from drift where what = 'label' order by day")
    assert {row["stream"] for row in lake.rows("from drift")} == {"support-intents"}  # no other has a window
    inside, after = [row["psi"] for row in rows[:2]], [row["psi"] for row in rows[3:]]
    assert max(inside) < 0.1 < 0.5 < min(after)
    [predicted] = lake.rows("select sum(rows) as n from drift where what = 'prediction'")
    assert predicted["n"] == DAYS * 48


def test_an_old_lake_gets_the_views_when_a_writer_opens_it(tmp_path: Path) -> None:
    config = Config(state=str(tmp_path))
    with open_lake_for_writing(config) as lake:
        lake.rows("drop view drift")
        lake.rows("create or replace view label_delay as select 1 as x")
        lake.rows("drop table ticks")
    with open_lake_for_writing(config) as lake:
        assert lake.rows("from drift") == lake.rows("from label_delay") == lake.rows("from ticks") == []
        snapshot = lake.snapshot_id()
    with open_lake_for_writing(config) as lake:
        assert lake.snapshot_id() == snapshot
        there = {row["view_name"] for row in lake.rows("from duckdb_views() where database_name = 'lake'")}
        assert there == {*VIEWS, *QUESTIONS}


# --- docs/analysts.md: every question is asked, and what comes back makes sense.

QUESTIONS_ASKED: dict[str, str] = dict(
    re.findall(r"^### \d+\. (.*?)\n.*?^```sql\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
)
EXPECTED: dict[str, Any] = {
    "How accurate is each version, week by week?": lambda rows: (
        {r["model"] for r in rows} == {"support-intents@0", "support-intents@1"}
        and all(0.3 < r["accuracy"] < 1 and 0.5 < r["coverage"] <= 1 for r in rows)
    ),
    "Can its probabilities be believed?": lambda rows: all(abs(r["accuracy"] - r["confidence"]) < 0.7 for r in rows),
    "What is pending, and how old is it?": lambda rows: sum(r["pending"] for r in rows) == 5,
    "How long do labels take?": lambda rows: (
        {r["stream"] for r in rows} == {"support-intents", "credit-risk"}
        and all(0 < r["p50_hours"] <= r["p95_hours"] for r in rows)
    ),
    "Which rows made this model?": lambda rows: (
        len(rows) == 86 and max(r["predicted_at"] for r in rows) < START + timedelta(days=2)
    ),
    "Which intents are taken for which?": lambda rows: (
        rows and all(r["said"] != r["truth"] for r in rows) and all(a["n"] >= b["n"] for a, b in pairwise(rows))
    ),
    "Whose label was changed later?": lambda rows: (
        len(rows) == 12 and all(r["labels"][0] != r["labels"][1] for r in rows)
    ),
    "How much expires without an answer?": lambda rows: (
        {r["stream"] for r in rows} == {"support-intents", "credit-risk"}
    ),
    "What has changed since yesterday?": lambda rows: sum(r["rows"] for r in rows) > DAYS * 40,
    "Where is the model weak?": lambda rows: (
        [r["grade"] for r in rows] == list("ABCD") and sum(r["loans"] for r in rows) == 100
    ),
    "What do wrong decisions cost?": lambda rows: (
        len(rows) >= 5 and all(r["cost"] > 0 for r in rows) and len({r["cost"] for r in rows}) > 1
    ),
    "Has what comes in changed?": lambda rows: rows and all(r["psi"] > 0.25 for r in rows),
}


@pytest.mark.parametrize("question", sorted({*QUESTIONS_ASKED, *EXPECTED}))
def test_the_page_of_questions_runs_as_written(accrual: Any, lake: Any, question: str) -> None:
    rows = lake.rows(QUESTIONS_ASKED[question])
    assert rows
    assert EXPECTED[question](rows), rows
    assert len(json.loads(accrual("sql", QUESTIONS_ASKED[question], "--format", "json"))) == len(rows)


def test_the_snippet_for_python_reads_the_lake(config: Config) -> None:
    """Those for pandas and polars differ in their last line: what they make of Arrow is theirs."""
    [snippet] = re.findall(r"```python\n(import duckdb.*?)```", PAGE, re.DOTALL)
    lines = [line for line in snippet.splitlines() if "to_arrow_table" in line or not line.startswith("frame")]
    code = "\n".join(lines).replace(".accrual/lake", f"{config.state}/lake") + "\nprint(table.num_rows)"
    code = re.sub(r'connection.execute\("INSTALL.*\n', "", code)
    offline = "import accrual.lake, duckdb\nmade = accrual.lake._connect(accrual.config.Config())\n"
    code = f"{offline}duckdb.connect = lambda: made\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# --- Time travel and the shell.


def test_the_lake_at_a_snapshot_and_at_a_time(accrual: Any, lake: Any) -> None:
    count = ("sql", "--format", "json", "select count(*) as n from windows", "--at")
    first, last = lake.rows(
        "select min(snapshot_id) as id, max(snapshot_time) as t from ducklake_snapshots('lake')"
        " where snapshot_id >= (select max(snapshot_id) - 1 from ducklake_snapshots('lake'))"
    )[0].values()
    assert json.loads(accrual(*count, str(first))) == [{"n": 0}]
    assert json.loads(accrual(*count, last.isoformat())) == [{"n": 1}]
    assert json.loads(accrual(*count, (last - timedelta(microseconds=1)).isoformat())) == [{"n": 0}]
    assert "oldest is of" in accrual(*count, "2020-01-01", exit_code=1)
    assert "neither a snapshot" in accrual(*count, "yesterday", exit_code=2)


def shell(config: Config, statements: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from accrual.cli import main; main()", "sql", "--shell", *words],
        env={**os.environ, **config.environment(), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        input=f".mode csv\n{statements}",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_shell_is_duckdbs_and_reads_only(config: Config, lake: Any) -> None:
    rows = lake.rows("select count(*) as n from predictions")[0]["n"]
    done = shell(config, "select count(*) as n, current_setting('TimeZone') as z from predictions;\n")
    assert done.stdout.replace("\r", "") == f"n,z\n{rows},UTC\n", done.stderr
    assert "read-only" in shell(config, "delete from predictions;\n").stderr
    then = shell(config, "select count(*) as n from windows;\n", "--at", str(lake.snapshot_id() - 1))
    assert then.stdout.replace("\r", "") == "n\n0\n"


# --- Exports.


def test_an_export_to_parquet_has_the_rows_typed(accrual: Any, lake: Any, tmp_path: Path) -> None:
    to = tmp_path / "new" / "loans.parquet"
    export = ("export", "--stream", "credit-risk", "--to", str(to), "--where", "inputs.amount > 50000")
    assert "50 rows would be written" in accrual(*export, "--dry-run")
    assert not to.exists()
    assert f"50 rows are in {to}" in accrual(*export)
    table = pq.read_table(to)
    assert table.to_pylist() == lake.rows(
        "from ground_truth_credit_risk where inputs.amount > 50000 order by predicted_at, prediction_id"
    )
    assert "is there already; --force" in re.sub(r"[\s│]+", " ", accrual(*export, exit_code=2))
    accrual(*export[:-1], "inputs.amount > 99000", "--force")
    assert pq.read_table(to).num_rows == 1
    assert list(to.parent.iterdir()) == [to]


def test_an_export_that_fails_leaves_what_was_there(accrual: Any, tmp_path: Path) -> None:
    to = tmp_path / "x.jsonl"
    to.write_text("mine")
    export = ("export", "--to", str(to), "--force", "--format", "jsonl")
    assert "no_such" in accrual(*export, "--stream", "credit-risk", "--where", "no_such = 1", exit_code=1)
    assert "'nobody'" in accrual(*export, "--stream", "nobody", exit_code=1)
    assert "no sealed window 9" in accrual(*export, "--stream", "credit-risk", "--window", "9", exit_code=1)
    assert to.read_text() == "mine"


def test_an_export_of_a_window_to_json_lines(accrual: Any, lake: Any, tmp_path: Path) -> None:
    to = tmp_path / "window.jsonl"
    accrual("export", "--stream", "support-intents", "--window", "1", "--format", "jsonl", "--to", str(to))
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert len(rows) == 96
    assert rows[1]["inputs"] == {"text": "question 1"}
    assert datetime.fromisoformat(rows[-1]["predicted_at"]) < START + timedelta(days=2)


def test_a_data_set_has_its_card_and_its_columns(accrual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accrual.lake_export._ROWS_A_FILE", 0)
    monkeypatch.setattr("accrual.lake._BATCH_ROWS", 2048)
    to = tmp_path / "intents"
    accrual("export", "--stream", "support-intents", "--format", "hf-dataset", "--to", str(to))
    assert pq.read_table(to / "data").num_rows == DAYS * 48 - 5
    header = json.loads((to / "README.md").read_text().split("---\n")[1])
    features = {feature["name"]: feature for feature in header["dataset_info"]["features"]}
    assert features["inputs"]["struct"] == [{"name": "text", "dtype": "string"}]
    assert list(features) == pq.read_schema(to / "data" / "train-00000.parquet").names
    accrual(
        "export",
        "--stream",
        "support-intents",
        "--format",
        "hf-dataset",
        "--to",
        str(to),
        "--force",
        "--where",
        "false",
    )
    assert pq.read_table(to / "data").num_rows == 0


# --- Asking stops no writer.


@pytest.mark.parametrize("catalog", ["sqlite", "postgres"])
def test_a_reader_that_takes_its_time_stops_no_writer(
    request: pytest.FixtureRequest, tmp_path: Path, catalog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is made between any two batches of one long query, and inside a reader's open transaction."""
    monkeypatch.setattr("accrual.lake._BATCH_ROWS", 2048)
    where = "" if catalog == "sqlite" else request.getfixturevalue("postgres_catalog")
    config = Config(state=str(tmp_path), lake=Lake(catalog=where, data=str(tmp_path / "data")))

    def commit(writer: WritableLake, rows: int) -> None:
        made = [{"stream": "s", "prediction_id": f"{n}", "day": START.date()} for n in range(rows)]
        assert writer.append({"predictions": pa.Table.from_pylist(made, TABLES["predictions"])})

    with open_lake_for_writing(config) as writer:
        commit(writer, 10_000)
        with open_lake(config) as reader:
            reader.rows("begin")
            assert reader.rows("select count(*) as n from predictions") == [{"n": 10_000}]
            seen = 0
            for batch in reader.batches("from predictions"):
                seen += batch.num_rows
                before = writer.snapshot_id()
                commit(writer, 1)
                assert writer.snapshot_id() == before + 1
            assert seen == 10_000
            assert reader.rows("select count(*) as n from predictions") == [{"n": 10_000}]  # its snapshot still
            reader.rows("commit")
            assert reader.rows("select count(*) as n from predictions")[0]["n"] > 10_000
