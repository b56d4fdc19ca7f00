"""Views over streams of several labels and of scores: they say what the trainer's scores say."""

import random
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from accrual.config import Config, Topics
from accrual.events import Distribution, Outcome, Prediction, encode
from accrual.judged import Judged, judged
from accrual.lake import open_lake, open_lake_for_writing
from accrual.scores import truth_of
from tests.consumers.conftest import START, World

ROOT = Path(__file__).parents[2]
ROWS = 120
EMOTIONS, SIMILARITY = "comment-emotions", "text-similarity"


class Readers(World):
    """Comments with their emotions, and pairs with their likeness."""

    def fill(self) -> None:
        chance = random.Random(3)
        names = self.contracts[EMOTIONS].output.classes
        for n in range(ROWS):
            felt = ",".join(chance.sample(names, chance.choice([1, 1, 2])))
            p = {name: round(chance.uniform(0, 0.3) + 0.6 * (name in felt.split(",")), 6) for name in names}
            said = ",".join(name for name in names if p[name] >= 0.5)
            output = Distribution(task="multilabel", label=said, probabilities=p)
            self.answered(EMOTIONS, n, {"text": f"comment {n}"}, output, {"emotions": felt}, felt)
            stars = chance.choice([0.0, 1.0, 2.5, 4.0, 5.0])
            score = round(min(1.0, max(0.0, stars / 5 + chance.gauss(0, 0.2))), 6)
            output = Distribution(task="score", label=str(score), probabilities={"score": score})
            pair = {"first": f"a {n}", "second": f"b {n}"}
            self.answered(SIMILARITY, n, pair, output, {"similarity": stars}, str(stars / 5))

    def answered(
        self, stream: str, n: int, inputs: dict[str, Any], output: Distribution, values: dict[str, Any], label: str
    ) -> None:
        p = Prediction(
            prediction_id=f"{stream}-{n:04}",
            stream=stream,
            model=f"{stream}@1",
            predicted_at=START + timedelta(minutes=n),
            inputs=msgspec.Raw(encode(inputs)),
            output=msgspec.Raw(encode(output)),
        )
        o = Outcome(
            prediction_id=p.prediction_id,
            stream=stream,
            observed_at=p.predicted_at + timedelta(hours=1),
            values=msgspec.Raw(encode(values)),
        )
        assert self.contracts[stream].label_of(values) == label
        truth = msgspec.structs.replace(super().ground_truth(p, None), status="labeled", label=label, revision=1)
        truth = msgspec.structs.replace(truth, observed_at=o.observed_at, values=o.values)
        for event in (p, o, truth):
            self.send(event)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = Config(
        topics=Topics(prefix="readers", partitions=2),
        state=str(tmp_path_factory.mktemp("readers")),
        contracts=str(ROOT / "schemas/contracts"),
    )
    world = Readers(config)
    with open_lake_for_writing(config) as lake:
        world.fill()
        world.pour(lake)
    with open_lake(config) as lake:
        yield world, lake


def by_the_trainer(world: World, lake: Any, stream: str) -> Judged:
    rows = lake.rows("select output, label from ground_truth where stream = ?", [stream])
    said = [list(msgspec.json.decode(row["output"])["probabilities"].values()) for row in rows]
    output = world.contracts[stream].output
    return judged(np.array(said), truth_of(output, [row["label"] for row in rows], output.classes))


@pytest.mark.parametrize("stream", [EMOTIONS, SIMILARITY])
def test_views_say_what_the_trainers_scores_say(readers: Any, stream: str) -> None:
    world, lake = readers
    wanted = by_the_trainer(world, lake, stream)
    [found] = lake.rows("from accuracy_by_version where stream = ?", [stream])
    assert (found["labeled"], found["accuracy"]) == (ROWS, pytest.approx(wanted.accuracy))
    assert found["brier"] == pytest.approx(wanted.brier.mean())
    bins = lake.rows("from calibration_by_version where stream = ?", [stream])
    assert [row["ece"] for row in bins] == pytest.approx([wanted.ece] * len(bins))
    assert sum(row["labeled"] for row in bins) == len(wanted.said)
    assert [row["accuracy"] for row in bins] == pytest.approx([b.happened for b in wanted.reliability])
