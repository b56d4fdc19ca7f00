"""The model feed against a real models topic: the newest good champion, swapped in whole, and never lost again."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from accrual import BundleError, Distribution, ModelFeed, NoChampion
from accrual.config import Config, Kafka, Topics
from accrual.events import encode
from accrual.feed import Predict
from accrual.kafka import TopicNames, create_topics, producer
from accrual.ledger import Generation, Run

STREAM = "support-intents"


@pytest.fixture
def config(bootstrap: str, prefix: str) -> Config:
    made = Config(kafka=Kafka(bootstrap_servers=bootstrap), topics=Topics(prefix=prefix, partitions=1))
    create_topics(made)
    return made


def generation(version: int, stream: str = STREAM) -> Generation:
    return Generation(
        stream=stream,
        version=version,
        model=f"{stream}@{version}",
        digest="0" * 64,
        bundle="0" * 64,
        run_id=f"run-{version}",
        parent=None,
        windows=[],
        rows=0,
        published_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def announce(config: Config, *generations: Generation | bytes) -> None:
    client = producer(config)
    for item in generations:
        key = item.stream if isinstance(item, Generation) else STREAM
        value = encode(item) if isinstance(item, Generation) else item
        client.produce(TopicNames(config.topics.prefix).models, value, key.encode())
    assert client.flush(10) == 0


def loader(*broken: int) -> tuple[Callable[[Generation], Predict], list[int]]:
    """A load function whose models answer with their version; those of `broken` versions do not load."""
    loaded: list[int] = []

    def load(generation: Generation) -> Predict:
        loaded.append(generation.version)
        if generation.version in broken:
            raise BundleError("altered")

        def predict(inputs: Sequence[Mapping[str, Any]]) -> list[Distribution]:
            return [Distribution(label=str(generation.version), probabilities={}) for _ in inputs]

        return predict

    return load, loaded


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 20 s"
        time.sleep(0.02)


def test_hands_out_the_last_one_and_swaps_to_the_next(config: Config) -> None:
    load, loaded = loader()
    announce(config, generation(0), generation(9, stream="credit-risk"), generation(1))
    with ModelFeed(STREAM, config, load=load) as feed:
        first = feed.champion(timeout=20)
        assert first.model == "support-intents@1"
        assert [d.label for d in first.predict([{}, {}])] == ["1", "1"]
        assert loaded == [1], "what was replaced long ago is not loaded"
        announce(config, generation(2))
        until(lambda: feed.champion().model == "support-intents@2")
        assert first.predict([{}])[0].label == "1", "who holds a champion keeps a whole one"
        assert feed.refused == 0


def test_a_generation_that_does_not_load_is_refused_and_surfaced(config: Config) -> None:
    load, _ = loader(1, 2)
    refused: list[tuple[int, str]] = []
    announce(config, generation(0), generation(1))

    def surfaced(generation: Generation, error: Exception) -> None:
        refused.append((generation.version, str(error)))
        raise ValueError("the callback's own trouble")

    with ModelFeed(STREAM, config, load=load, on_refused=surfaced) as feed:
        assert feed.champion(timeout=20).model == "support-intents@0"
        announce(config, generation(2), b"not an announcement")
        until(lambda: feed.refused == 2)
        assert feed.champion().model == "support-intents@0"
        announce(config, generation(3))
        until(lambda: feed.champion().model == "support-intents@3")
    assert refused == [(1, "altered"), (2, "altered")]


def run(version: int, state: str) -> Run:
    return msgspec.convert(
        {
            "type": "run",
            "run_id": f"run-{version}",
            "stream": STREAM,
            "version": version,
            "parent": f"{STREAM}@0",
            "windows": [1],
            "snapshot_id": 1,
            "rows_new": 60,
            "rows_replayed": 0,
            "seed": 17,
            "digest": "1" * 64,
            "state": state,
            "reason": "",
            "seconds": 1.0,
            "at": datetime(2026, 1, 1, tzinfo=UTC),
        },
        Run,
    )


def say(config: Config, *runs: Run | bytes) -> None:
    client = producer(config)
    for item in runs:
        value = encode(item) if isinstance(item, Run) else item
        client.produce(TopicNames(config.topics.prefix).training, value, STREAM.encode())
    assert client.flush(10) == 0


def test_the_challenger_is_handed_out_while_it_waits_for_its_verdict(config: Config) -> None:
    load, loaded = loader(3)
    announce(config, generation(0))
    say(config, run(1, "trained"), run(1, "rejected"), b"not an entry", run(2, "trained"))
    with ModelFeed(STREAM, config, load=load, challenger=True) as feed:
        assert feed.champion(timeout=20).model == "support-intents@0"
        until(lambda: feed.challenger() is not None)
        challenger = feed.challenger()
        assert challenger is not None and challenger.model == "support-intents@2"
        assert challenger.predict([{}])[0].label == "2" and loaded.count(1) == 0

        served = [feed.assigned(f"customer {n}", 0.25).model for n in range(2000)]
        assert served == [feed.assigned(f"customer {n}", 0.25).model for n in range(2000)]
        assert 0.2 < served.count("support-intents@2") / 2000 < 0.3
        assert feed.assigned("one", 0.0).model == "support-intents@0"
        assert feed.assigned("one", 1.0).model == "support-intents@2"

        say(config, run(2, "waiting"), run(2, "promoted"))
        until(lambda: feed.challenger() is None)
        assert feed.assigned("one", 1.0).model == "support-intents@0"
        say(config, run(3, "trained"))
        until(lambda: feed.refused == 1)
        say(config, run(3, "waiting"), run(4, "trained"))
        until(lambda: (now := feed.challenger()) is not None and now.model == "support-intents@4")
        assert loaded.count(2) == loaded.count(3) == 1, "a run that goes on waiting is not loaded again"


def test_without_a_request_no_challenger_is_loaded(config: Config) -> None:
    load, loaded = loader()
    announce(config, generation(0))
    say(config, run(1, "trained"))
    with ModelFeed(STREAM, config, load=load) as feed:
        assert feed.champion(timeout=20).model == "support-intents@0"
        time.sleep(1)
        assert feed.challenger() is None and loaded == [0]


def test_waits_for_the_first_and_says_when_there_is_none(config: Config) -> None:
    load, _ = loader()
    with ModelFeed(STREAM, config, load=load) as feed:
        with pytest.raises(NoChampion, match=r"within 0\.2 s"):
            feed.champion(timeout=0.2)
        announce(config, generation(0))
        assert feed.champion(timeout=20).model == "support-intents@0"


def test_the_default_loader_refuses_a_bundle_that_is_not_there(config: Config, tmp_path: Any) -> None:
    pytest.importorskip("torch")
    errors: list[Exception] = []
    announce(config, generation(0))
    kept_elsewhere = Config(kafka=config.kafka, topics=config.topics, state=str(tmp_path))
    with ModelFeed(STREAM, kept_elsewhere, on_refused=lambda _, error: errors.append(error)) as feed:
        until(lambda: feed.refused == 1)
        assert isinstance(errors[0], BundleError)
