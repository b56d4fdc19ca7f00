"""What the benchmark says of an output topic, and of how values spread."""

from __future__ import annotations

import math

from check import Verdict, verdict
from load import Load, expected_label
from measure import percentile

from accrual.config import load_config
from accrual.kafka import TopicNames, create_topics, producer


def test_rows_that_are_missing_extra_or_wrong_are_counted(bootstrap: str, prefix: str) -> None:
    config = load_config({}, kafka={"bootstrap_servers": bootstrap}, topics={"prefix": prefix})
    create_topics(config)
    topic = TopicNames(prefix).ground_truth
    labels = {n: expected_label(n) for n in range(1000) if n not in (5, 6)}
    client = producer(config)
    for n, label in [*labels.items(), (7, labels[7]), (5, expected_label(6)), (1000, expected_label(1000))]:
        client.produce(topic, b'{"prediction_id":"%016x","label":"%b"}' % (n, label.encode()), b"%016x" % n)
    client.flush(10)
    found = verdict(config, topic, Load(1000, 1000))
    assert found == Verdict(rows=1001, missing=2, extra=1, wrong=2)
    assert str(found) == "2 missing, 1 extra, 2 wrong"
    assert str(Verdict(1000, 0, 0, 0)) == "exact"


def test_percentiles_are_values_that_occurred() -> None:
    values = list(range(1, 201))
    assert percentile(values, 50) == 100
    assert percentile(values, 99) == 198
    assert percentile([3.0], 99) == 3.0
    assert math.isnan(percentile([], 50))
