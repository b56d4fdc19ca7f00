"""The two computations of the label agree: the join's rule in Python and the audit's in SQL, whatever the rule."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from accrual.contract import Contract
from accrual.errors import Rejected
from accrual.events import Outcome, Prediction, encode, instant, microseconds
from accrual.kafka import TopicNames
from accrual.lake import Move, WritableLake
from consumers.recompute import Scope, recompute
from consumers.rows import arrow_tables, readers
from streams.join import Entry, apply_outcome, apply_prediction, seen_of
from tests.consumers.conftest import START, Record

NAMES = TopicNames("t")
VALUES = {"mark": "string", "points": "number", "stars": "integer", "sure": "boolean"}
SAYS = [
    {"field": "mark"},
    {"field": "mark", "map": {"a": "A", "b": "B", "c": "A"}},
    {"field": "points"},
    {"field": "stars"},
    {"field": "sure"},
    {"expression": "coalesce(mark, 'none') if sure else None if points is None else 'points'"},
    {"expression": "points / stars"},
    {"expression": "stars * 2 - 1"},
    {"expression": "points > 0.15 or sure", "map": {"True": "yes", "False": "no"}},
]
NUMERIC = [{"field": "points"}, {"field": "stars"}, {"expression": "points * stars if sure else points"}]
THRESHOLDS = [{"yes": 0.3, "no": 0.2}, {"yes": 3, "no": -float("inf")}, {"much": 1.1, "some": 0.6, "none": 0}]


def rules(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Every way to take outcomes together, with everything one outcome may say."""
    for take in ("last", "first", "majority", "sum"):
        says: list[dict[str, Any]] = (
            [{**of, "thresholds": at} for of, at in itertools.product(NUMERIC, THRESHOLDS)] if take == "sum" else SAYS
        )
        for rule in says:
            sources = chance.choice([None, ["agent"], ["agent", "click"], ["chargeback", "agent", "click"]])
            yield {**rule, "take": take, "sources": sources, "complete_when": chance.choice([1, 1, 2, 3])}


def contract(stream: str, label: dict[str, Any]) -> Contract:
    return msgspec.convert(
        {
            "stream": stream,
            "inputs": {"text": {"type": "string"}},
            "output": {"classes": ["yes", "no"], "open": True},
            "outcome": {"values": {name: {"type": kind, "optional": True} for name, kind in VALUES.items()}},
            "label": label,
            "horizon": "10h",
            "training": {"template": "{text}"},
        },
        Contract,
    )


def said(chance: random.Random) -> dict[str, Any]:
    made = {
        "mark": chance.choice(["a", "b", "c", "it's é"]),
        "points": chance.choice([0, 0.1, 0.2, 0.3, 1e-7, 1e14, -0.0, -0.5]),
        "stars": chance.choice([0, 1, 2, 2**54]),
        "sure": chance.choice([True, False]),
    }
    return {name: value if chance.random() < 0.9 else None for name, value in made.items() if chance.random() < 0.9}


@pytest.mark.parametrize("seed", range(3))
def test_python_and_sql_agree_on_the_label_of_many_outcomes(lake: WritableLake, seed: int) -> None:
    chance = random.Random(seed)
    contracts = {f"s{n}": contract(f"s{n}", rule) for n, rule in enumerate(rules(chance))}
    records: list[Record] = []
    expected: dict[str, tuple[Any, ...]] = {}

    def send(topic: str, event: Prediction | Outcome) -> None:
        at = sum(record.to == topic for record in records)
        key = event.prediction_id.encode()
        records.append(Record(topic, 0, at, key, encode(event), 1_764_000_000_000))

    for stream, rule in contracts.items():
        for n in range(12):
            p = Prediction(
                prediction_id=f"{stream}-{n}",
                stream=stream,
                model="m@0",
                predicted_at=START,
                inputs=msgspec.Raw(b'{"text":"?"}'),
                output=msgspec.Raw(b'{"label":"yes","probabilities":{"yes":1.0}}'),
            )
            send(NAMES.predictions, p)
            entry: Entry | None = apply_prediction(None, rule, p, microseconds(p.predicted_at), 0, b"", 0).entry
            row = None
            for _ in range(chance.choice([0, 1, 2, 3, 4, 6])):
                o = Outcome(
                    prediction_id=p.prediction_id,
                    stream=stream,
                    observed_at=START + timedelta(hours=chance.randrange(13)),
                    values=msgspec.Raw(json.dumps(said(chance)).encode()),
                    source=chance.choice(["agent", "click", "chargeback", "other"]),
                )
                try:
                    rule.label_of(rule.decode_values(o.values))
                except Rejected:
                    continue
                send(NAMES.outcomes, o)
                step = apply_outcome(entry, rule, seen_of(rule, o, microseconds(o.observed_at)), 0, b"")
                entry, row = step.entry, step.row or row
            expected[p.prediction_id] = (
                (row.revision, row.label, instant(seen.observed_at), seen.values.decode(), seen.source)
                if row and (seen := row.outcome)
                else (0, None, None, None, None)
            )
    tables, skipped = arrow_tables(records, readers(NAMES, contracts))  # type: ignore[arg-type]
    assert skipped == []
    lake.claim({(topic, 0): 0 for topic in (NAMES.predictions, NAMES.outcomes)})
    assert lake.append(tables, [Move(NAMES.predictions, 0, 0, len(expected))])
    recompute(lake, contracts, NAMES, Scope())
    found = lake.rows('select prediction_id, revision, label, observed_at, "values", source from expected')
    assert {row.pop("prediction_id"): tuple(row.values()) for row in found} == expected
    assert len({label for _, label, *_ in expected.values()}) > 15
