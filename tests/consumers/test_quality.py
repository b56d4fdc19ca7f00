"""Rules put rows into quarantine, bounds hold windows back, and both can be seen and decided upon."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from accrual.config import Config
from accrual.contract import Contract, load_contract
from accrual.lake import WritableLake, open_lake
from accrual.lake_tables import TABLES
from accrual.watermark import watermark_of
from consumers.__main__ import app
from consumers.quality import Report, inspect, unrecorded
from consumers.windows import Sealer, next_window
from tests.consumers.conftest import START, World

STREAM = "loans"
BASE: dict[str, Any] = {
    "stream": STREAM,
    "inputs": {
        "amount": {"type": "number", "optional": True},
        "term": {"type": "integer", "optional": True},
        "grade": {"type": "string", "optional": True},
        "title": {"type": "string", "optional": True},
        "paid": {"type": "boolean", "optional": True},
    },
    "output": {"classes": ["good", "bad"]},
    "outcome": {"values": {"status": {"type": "string"}, "days": {"type": "integer", "optional": True}}},
    "label": {"field": "status"},
    "horizon": "1d",
    "training": {"template": "{title}", "window_rows": 10},
}
Row = Mapping[str, Any]


@pytest.fixture
def contract_of(tmp_path: Path) -> Callable[..., Contract]:
    """A contract with this quality section, read as any is."""

    def make(**quality: Any) -> Contract:
        path = tmp_path / "contract.yaml"
        path.write_text(yaml.safe_dump({**BASE, "quality": quality}))
        return load_contract(path)

    return make


def pour(lake: WritableLake, rows: list[Row], first_minute: int = 0) -> None:
    """Predictions with their ground truth, one a minute: inputs, and `label`, `output` and `values` if they are there.

    Those whose label is "pending" have none yet.
    """
    made = [
        {
            "stream": STREAM,
            "prediction_id": row.get("id", f"p-{first_minute + n:05d}"),
            "revision": 1,
            "status": "labeled" if row.get("label", "good") else "expired",
            "label": row.get("label", "good"),
            "model": f"{STREAM}@0",
            "predicted_at": START + timedelta(minutes=first_minute + n),
            "inputs": msgspec.json.encode(row["inputs"]).decode(),
            "output": msgspec.json.encode({"label": "good", "probabilities": row.get("says", {"good": 1.0})}).decode(),
            "values": msgspec.json.encode(row.get("values", {"status": row.get("label", "good")})).decode(),
            "partition": 0,
            "offset": first_minute + n,
        }
        for n, row in enumerate(rows)
    ]
    known = [row for row in made if row["label"] != "pending"]
    lake.append(
        {
            "predictions": pa.Table.from_pylist(made, TABLES["predictions"]),
            "ground_truth_history": pa.Table.from_pylist(known, TABLES["ground_truth_history"]),
        }
    )


def seal_by_hand(lake: WritableLake, minutes: int) -> None:
    window = {"stream": STREAM, "window": 1, "snapshot_id": lake.snapshot_id(), "from_time": START, "labeled": minutes}
    window |= {"to_time": START + timedelta(minutes=minutes), "rows": minutes, "coverage": 1.0, "digest": ""}
    lake.append({"windows": pa.Table.from_pylist([window | {"sealed_at": START}], TABLES["windows"])})


def look(lake: WritableLake, contract: Contract, since: int = 0, until: int = 100_000) -> Report:
    return inspect(lake, contract, 2, START + timedelta(minutes=since), START + timedelta(minutes=until))


def value(report: Report, metric: str, field: str = "", part: str = "") -> float:
    [found] = [f.value for f in report.findings if (f.metric, f.field, f.part) == (metric, field, part)]
    return found


RULES: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"field": "amount", "range": {"least": 0, "most": 10}}, [0, 10, 3.5, None], [-0.001, 10.001]),
    ({"field": "term", "range": {"least": 36}}, [36, 10**15], [35, -(10**15)]),
    ({"field": "grade", "categories": ["A", "it's"]}, ["A", "it's", None], ["a", "", "A "]),
    ({"field": "title", "matches": r"[a-z]+\d?"}, ["abc", "abc1", None], ["", "abc12", "x abc", "abc\n"]),
    ({"field": "title", "length": {"least": 2, "most": 3}}, ["ab", "äöü", None], ["a", "abcd", ""]),
    (
        {"field": "title", "scripts": ["Latin", "Greek"]},
        ["für 5 µm, e\u0301t\u00e9 №1!", "και", "", None],
        ["привет", "ok 你好", "раypal"],
    ),
    (
        {"expression": "amount <= 2 * term or grade == 'A'"},
        [{"amount": 2, "term": 1}, {"amount": 9}],
        [{"amount": 3, "term": 1, "grade": "B"}],
    ),
    ({"expression": "paid or values_days < 90"}, [{"paid": True}, {"paid": None}], [{"paid": False}]),
]


def test_a_rule_finds_what_breaks_it_and_nothing_else(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    contract = contract_of(rules=[{"name": str(n), **rule} for n, (rule, _, _) in enumerate(RULES)])

    def row(n: int, verdict: str, k: int, value: Any) -> Row:
        inputs = value if isinstance(value, dict) else {RULES[n][0]["field"]: value}
        return {"id": f"{n} {verdict} {k}", "inputs": inputs, "values": {"status": "good", "days": 90}}

    rows = [row(n, "fit", k, value) for n, (_, fit, _) in enumerate(RULES) for k, value in enumerate(fit)]
    broken = [row(n, "unfit", k, value) for n, (_, _, unfit) in enumerate(RULES) for k, value in enumerate(unfit)]
    pour(lake, rows + broken)
    found = [b for b in look(lake, contract).broken if b["prediction_id"].split()[0] == b["rule"]]
    assert {b["prediction_id"] for b in found} == {row["id"] for row in broken}
    assert all(b["detail"] for b in found)


def test_a_rule_may_be_about_an_outcome(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    contract = contract_of(rules=[{"name": "r", "field": "values.days", "range": {"most": 30}}])
    pour(lake, [{"inputs": {}, "values": {"status": "good", "days": days}} for days in (30, 31, None)])
    assert [b["prediction_id"] for b in look(lake, contract).broken] == ["p-00001"]


PERSONAL = {
    "jo+x@mail.example.co.uk": "e-mail address",
    "call +49 (0)30 1234567": "phone number",
    "0044 20 7946 0958 now": "phone number",
    "(555) 123-4567": "phone number",
    "DE89 3704 0044 0532 0130 00": "IBAN",
    "GB82WEST12345698765432": "IBAN",
    "4111 1111 1111 1111": "card number",
    "my card 5500005555555559!": "card number",
    "378282246310005": "card number",
    "line 5 4939 7298 0635 1393 2": "card number",
    "DE89 3704 0044 0532 0130 00 CALL ME": "IBAN",
    "from 192.168.0.1.": "IP address",
    "at 2001:db8:85a3:0:0:8a2e:370:7334": "IP address",
    "at fe80::1ff:fe23:4567:890a": "IP address",
    "078-05-1120": "social security number",
}
HARMLESS = [
    "I was charged 1,000.00 twice on 2011-02-03 at 10:15:30",
    "order 4111 1111 1111 1112",
    "reference 1234567890123456",
    "GB00WEST12345698765432",
    "version 1.2.3.400, 300.1.1.1",
    "me @ home, you@home",
    "between 2007 and 2011: 10000 at 7.5%",
    "",
]


def test_personal_data_is_found_and_not_repeated(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    contract = contract_of(rules=[{"name": "r", "field": "title", "pii": "forbid"}])
    pour(lake, [{"id": text, "inputs": {"title": text}} for text in [*PERSONAL, *HARMLESS]])
    found = {b["prediction_id"]: b["detail"] for b in look(lake, contract).broken}
    assert {text: kind in found.get(text, "") for text, kind in PERSONAL.items()} == dict.fromkeys(PERSONAL, True)
    assert [text for text in HARMLESS if text in found] == []
    assert not any(text in detail for text, detail in found.items())


def test_canaries_measure_each_rule_and_a_blind_one_fails(
    lake: WritableLake, contract_of: Callable[..., Contract], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [{"name": f"r{n}", **rule} for n, (rule, _, _) in enumerate(RULES)]
    rules.append({"name": "pii", "field": "title", "pii": "forbid"})
    contract = contract_of(rules=rules, canaries={"rows": 40})
    good = {"amount": 4, "term": 40, "grade": "A", "title": "abc", "paid": True}
    pour(lake, [{"inputs": good, "values": {"status": "good", "days": 3}}] * 20)
    report = look(lake, contract)
    recalls = {f.field: f.value for f in report.findings if f.metric == "canary_recall"}
    assert recalls == {rule["name"]: 1.0 for rule in rules}
    assert report.broken == [] and report.failed == []
    assert look(lake, contract).findings == report.findings, "the same canaries each time"
    monkeypatch.setattr("consumers.rule_sql._EMAIL", "nothing looks like this")
    assert [f.field for f in look(lake, contract).failed] == ["pii"]


def test_shares_duplicates_and_conflicts(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    contract = contract_of(
        bounds=[{"metric": "label_share", "field": "bad", "most": 0.3}, {"metric": "label_share", "least": 0.5}]
    )
    rows = [{"inputs": {"amount": n}, "label": "good"} for n in range(6)]
    rows += [{"inputs": {"amount": 0}, "label": "bad"}, {"inputs": {"amount": 1}, "label": "good"}]
    rows += [{"inputs": {"amount": 9}, "label": "bad"}, {"inputs": {"amount": 10}, "label": "bad"}]
    rows += [{"inputs": {"amount": 0}, "label": None}]
    pour(lake, rows)
    report = look(lake, contract)
    assert value(report, "label_share", "bad") == 0.3 and value(report, "label_share", "good") == 0.7
    assert value(report, "duplicates") == pytest.approx(3 / 11, abs=1e-6)
    assert value(report, "label_conflicts") == 0.2
    assert report.failed == []
    stricter = contract_of(bounds=[{"metric": "label_share", "field": "bad", "most": 0.29}])
    assert [f.said for f in look(lake, stricter).failed] == ["label_share bad is 0.3, must be at most 0.29"]


def test_near_duplicates_are_those_that_share_most_of_their_wording(
    lake: WritableLake, contract_of: Callable[..., Contract]
) -> None:
    """Against every pair compared directly: MinHash may miss one in thousands, and adds none."""
    chance = random.Random(5)
    vocabulary = [f"w{n}" for n in range(400)]
    texts = [" ".join(chance.choices(vocabulary, k=40)) for _ in range(120)]
    for text in list(texts[:60]):
        words = text.split()
        words[chance.randrange(len(words))] = "other"
        texts.append(" ".join(words))
    texts += [f"{text.upper()}!" for text in texts[60:80]]

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.lower().replace("!", "").split()
        return {tuple(words[n : n + 3]) for n in range(len(words) - 2)}

    sets = [shingles(text) for text in texts]
    pairs = {
        frozenset((texts[a], texts[b]))
        for a in range(len(texts))
        for b in range(a)
        if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= 0.8
    }
    pour(lake, [{"inputs": {"title": text}} for text in texts])
    report = look(lake, contract_of(text="title"))
    assert len(pairs) == 80
    assert {frozenset((row["text"], row["like_text"])) for row in lake.rows("from near")} == pairs
    assert value(report, "near_duplicates") == pytest.approx(len(pairs) / len(texts), abs=1e-6)


def test_label_errors_are_those_of_confident_learning(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    """Against the definition, written with numpy."""
    chance = np.random.default_rng(3)
    truth = chance.integers(0, 2, 300)
    given = np.where(chance.random(300) < 0.1, 1 - truth, truth)
    bad = np.clip(np.where(truth == 1, 0.8, 0.2) + chance.normal(0, 0.15, 300), 0.01, 0.99)
    probabilities = np.stack([1 - bad, bad], axis=1)
    names = ["good", "bad"]
    rows = [
        {"inputs": {"amount": n}, "label": names[given[n]], "says": dict(zip(names, p.tolist(), strict=True))}
        for n, p in enumerate(probabilities)
    ]
    pour(lake, [*rows, {"inputs": {"amount": -1}, "label": "unheard_of", "says": {"good": 0.9, "bad": 0.1}}])
    thresholds = np.array([probabilities[given == j, j].mean() for j in (0, 1)])
    masked = np.where(probabilities >= thresholds, probabilities, -1)
    expected = {f"p-{n:05d}" for n in range(300) if masked[n].max() > 0 and masked[n].argmax() != given[n]}
    report = look(lake, contract_of())
    assert len(expected) > 15
    assert {row["prediction_id"] for row in lake.rows("from suspected")} == expected
    assert value(report, "label_errors") == pytest.approx(len(expected) / 301, abs=1e-6)


def test_drift_is_against_the_last_sealed_window(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    def rows(center: float, share: int, words: int) -> list[Row]:
        return [
            {
                "inputs": {
                    "amount": center + n % 50,
                    "grade": "A" if n % 10 < share else "B",
                    "title": f"t{n} " * words,
                },
                "label": "good" if n % 10 < share else "bad",
            }
            for n in range(200)
        ]

    contract = contract_of(bounds=[{"metric": "psi", "most": 0.2}])
    pour(lake, rows(0, 5, 3))
    assert not any(f.metric == "psi" for f in look(lake, contract).findings), "there is nothing to compare with"
    seal_by_hand(lake, 200)
    pour(lake, rows(0, 5, 3), 200)
    assert look(lake, contract, 200, 400).failed == []
    pour(lake, rows(20, 9, 30), 400)
    report = look(lake, contract, 400, 600)
    assert {f.field for f in report.failed} == {"amount", "grade", "title", "label"}
    p, q = np.array([180.5, 20.5]) / 201, np.array([100.5, 100.5]) / 201
    m = (p + q) / 2
    assert value(report, "psi", "grade") == pytest.approx(((p - q) * np.log(p / q)).sum(), abs=1e-6)
    js = ((p * np.log2(p / m)).sum() + (q * np.log2(q / m)).sum()) / 2
    assert value(report, "jensen_shannon", "grade") == pytest.approx(js, abs=1e-6)


def test_coverage_is_of_all_predictions_of_a_slice(lake: WritableLake, contract_of: Callable[..., Contract]) -> None:
    rows = [{"inputs": {"grade": "A"}, "label": "good"}] * 8 + [{"inputs": {"grade": "A"}, "label": None}] * 2
    rows += [{"inputs": {"grade": "B"}, "label": "bad"}] * 1 + [{"inputs": {"grade": "B"}, "label": None}] * 4
    rows += [{"inputs": {"grade": "B"}, "label": "pending"}] * 5
    pour(lake, rows)
    contract = contract_of(slices=["grade"], bounds=[{"metric": "coverage", "field": "grade", "least": 0.2}])
    report = look(lake, contract)
    assert (value(report, "coverage", "grade", "A"), value(report, "coverage", "grade", "B")) == (0.8, 0.1)
    p, q = np.array([8, 1]) / 9, np.array([0.5, 0.5])
    m = (p + q) / 2
    js = ((p * np.log2(p / m)).sum() + (q * np.log2(q / m)).sum()) / 2
    assert value(report, "representation", "grade") == pytest.approx(js, abs=1e-6)
    assert [f.part for f in report.failed] == ["B"]


def test_what_is_in_quarantine_counts_in_no_metric_of_the_window_until_it_is_released(
    lake: WritableLake, contract_of: Callable[..., Contract]
) -> None:
    contract = contract_of(
        rules=[
            {"name": "r", "field": "amount", "range": {"least": 0}},
            {"name": "w", "field": "amount", "range": {"most": 1}, "severity": "warn"},
        ]
    )
    pour(lake, [{"inputs": {"amount": -1}, "label": "bad"}, {"inputs": {"amount": 2}}, {"inputs": {"amount": 1}}])
    report = look(lake, contract)
    assert (report.rows, report.kept) == (3, 2), "a rule that only warns holds nothing back"
    news = unrecorded(lake, report)
    assert news["quarantine"].column("prediction_id").to_pylist() == ["p-00000"]
    lake.append(news)
    assert unrecorded(lake, look(lake, contract)) == {}, "nothing is said twice"
    for offset, (state, kept) in enumerate([("rejected", 2), ("released", 3), ("rejected", 2)]):
        decided = news["quarantine"].to_pylist()[0] | {"state": state, "offset": offset}
        lake.append({"quarantine": pa.Table.from_pylist([decided], TABLES["quarantine"])})
        assert lake.rows("select state from quarantined") == [{"state": state}]
        assert look(lake, contract).kept == kept


def with_quality(world: World, **quality: Any) -> None:
    path = Path(world.config.contracts) / "tickets.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "quality": quality}))
    world.contracts["tickets"] = load_contract(path)


def seal_all(world: World, lake: WritableLake) -> list[int]:
    """Window numbers, as a sink seals them: it looks again after nothing was sealed."""
    sealer, found = Sealer(lake, world.contracts, world.names), []
    for _ in range(20):
        found += [w["window"] for w in sealer.seal(world.guard(lake))]
    return found


def test_the_snapshot_that_a_window_is_sealed_at_shows_what_is_in_quarantine(
    config: Config, world: World, lake: WritableLake
) -> None:
    for n in range(120):
        p = world.prediction(n, text="Mail me: jo@mail.example" if n % 40 == 7 else f"It is down {n}")
        for event in (p, o := world.outcome(p), world.ground_truth(p, o)):
            world.send(event)
    world.let_time_pass()
    world.pour(lake)
    with_quality(world, rules=[{"name": "pii", "field": "text", "pii": "forbid"}], canaries={})
    assert seal_all(world, lake) == [1, 2]
    for window in lake.rows('from windows order by "window"'):
        with open_lake(config, at_snapshot=window["snapshot_id"]) as pinned:
            held = pinned.rows(
                'select prediction_id from quarantined where "window" = ? order by all', [window["window"]]
            )
        assert [row["prediction_id"] for row in held] == {1: ["p-000007", "p-000047"], 2: ["p-000087"]}[
            window["window"]
        ]
    recalls = lake.rows("select value, verdict from quality where metric = 'canary_recall'")
    assert recalls == [{"value": 1.0, "verdict": "ok"}] * 2


def test_a_window_beyond_a_bound_waits_until_the_bound_is_another(
    world: World, full_lake: Callable[[int], WritableLake], tmp_path: Path
) -> None:
    lake = full_lake(70)
    with_quality(
        world,
        rules=[{"name": "high", "field": "values.urgency", "categories": ["low"], "severity": "warn"}],
        bounds=[{"metric": "violations", "field": "high", "most": 0.1}],
    )
    assert seal_all(world, lake) == []
    candidate = next_window(
        lake, world.contracts, world.names, "tickets", watermark_of(lake, world.contracts["tickets"])
    )
    assert candidate.waits_for.startswith("quality: violations high is 0.")
    said = lake.rows("select verdict from quality where metric = 'violations'")
    assert said == [{"verdict": "failed"}], "said once, however often it is looked at"
    page, environment = tmp_path / "window.html", world.config.environment()
    asked = CliRunner().invoke(app, ["windows", "--report", "tickets/1", "--to", str(page)], env=environment)
    assert asked.exit_code == 0 and "the window is not sealed" in page.read_text(), asked.output
    none = CliRunner().invoke(app, ["windows", "--report", "tickets/2", "--to", str(page)], env=environment)
    assert "tickets has no window 2" in str(none.exception)
    with_quality(world, bounds=[{"metric": "violations", "most": 0.1}])
    assert seal_all(world, lake) == [1]
