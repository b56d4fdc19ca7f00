"""What is sent while the faults happen: a seeded story in which everything happens that happens to real streams.

Three streams, one for each way of treating late outcomes, and one whose outcomes name a loan instead of a prediction.
Event time runs from `START` on, about two hours a second, so that predictions expire while faults happen. The story has
three parts: `events`, some in the wrong partition; `rest`, whose events need those to have been forwarded; and
`aftermath`, which follows the tides that carry event time past every deadline. What must come out is not said here: the
oracle reads it from the topics.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, Literal, NamedTuple

from accrual.events import encode
from accrual.kafka import partition_of

PARTITIONS = 3
START = datetime(2026, 3, 1, tzinfo=UTC)
HORIZON = 16.0  # hours, like all times below
PREDICTING = 24.0
TIDE = 200.0

# Stream -> what its contract says. An orphan waits for horizon and disorder, 17 hours, eight seconds of the story: far
# longer than the way to the topic takes, so that no outcome is given up whose prediction is still on that way.
LATE = {"strict": "dead_letter", "lenient": "revise", "counting": "count"}
ON_EXPIRY = {"strict": "no", "lenient": "censored", "counting": "no"}
# Whose a loan's outcome is, is settled eight seconds after it: by then every prediction before it has come.
BY_LOAN = "by-loan"
LOANS = 150
CONTRACT = """
stream: {stream}
inputs: {{x: {{type: number}}}}
output: {{classes: ["yes", "no"]}}
outcome: {{values: {{answer: {{type: string}}}}}}
label: {{field: answer}}
horizon: 16h
on_expiry: "{on_expiry}"
late: {late}
disorder: {disorder}
remember: 1000h
training: {{template: "{{x}}"}}
"""

Topic = Literal["predictions", "outcomes"]


class Sending(NamedTuple):
    """One record on its way: sent when event time has come to `hour`; `partition` None means where its key belongs."""

    hour: float
    topic: Topic
    key: bytes | None
    value: bytes | None
    partition: int | None = None


class Story(NamedTuple):
    """The parts of a story, each in sending order."""

    events: list[Sending]
    rest: list[Sending]
    tides: list[Sending]
    aftermath: list[Sending]


def contracts() -> dict[str, str]:
    """The contract of each stream, as YAML."""
    made = {
        stream: CONTRACT.format(stream=stream, late=LATE[stream], on_expiry=ON_EXPIRY[stream], disorder="1h")
        for stream in LATE
    }
    loans = CONTRACT.format(stream=BY_LOAN, late="count", on_expiry="no", disorder="16h")
    return made | {BY_LOAN: loans + "join: {by: loan_id, to: latest}\n"}


def story(seed: int, predictions: int) -> Story:
    """The story of a seed: always the same."""
    rng = random.Random(f"story {seed}")
    events: list[Sending] = []
    rest: list[Sending] = []
    aftermath: list[Sending] = []
    for n in range(predictions):
        stream, id_, said = rng.choice(list(LATE)), f"id{n}", rng.uniform(0, PREDICTING)
        content = prediction(id_, stream, said, x=n)
        astray = rng.random() < 0.02
        first = Sending(_sent(rng, said, 0.3), "predictions", id_.encode(), content)
        events.append(first._replace(partition=_elsewhere(rng, id_)) if astray else first)
        outcomes = [*_outcomes(rng, id_, stream, said)]
        if astray:  # how long a worker takes to forward it is open: its outcomes wait here, not in the join
            rest += outcomes
            continue
        if outcomes and rng.random() < 0.03:
            wrong = _elsewhere(rng, id_)
            events += [one._replace(partition=wrong) if one.value == outcomes[0].value else one for one in outcomes]
            continue
        events += outcomes
        if rng.random() < 0.1:
            again = rng.choice([content, content, prediction(id_, stream, said + rng.choice([0, 0.5]), x=n, said="no")])
            events.append(first._replace(hour=_sent(rng, said, 2), value=again))
        if rng.random() < 0.05:
            aftermath += [first, *outcomes, *_outcomes(rng, id_, stream, said)]
        if rng.random() < 0.02:  # the same id in another stream is another prediction
            other = rng.choice([name for name in LATE if name != stream])
            events.append(first._replace(value=prediction(id_, other, said, x=n)))
        if rng.random() < 0.03:
            events += _outcomes(rng, f"nobody{n}", stream, said)
        if rng.random() < 0.02:
            events.append(_poison(rng, f"bad{n}", stream, said))
    for n in range(LOANS):
        events += _loan(random.Random(f"loan {seed} {n}"), f"loan{n}")
    events.sort(key=lambda sending: sending.hour)
    rng.shuffle(rest)
    rng.shuffle(aftermath)
    return Story(events, rest, [*_tides()], aftermath)


def prediction(id_: str, stream: str, hour: float, x: float = 1, said: str = "yes", **changes: Any) -> bytes:
    """A prediction as JSON; `changes` are other fields than these give."""
    output = {"label": said, "probabilities": {"yes": 0.75, "no": 0.25}}
    return encode(
        {
            "v": 1,
            "prediction_id": id_,
            "stream": stream,
            "model": f"toy@{int(hour) % 3}",
            "predicted_at": _instant(hour),
            "inputs": {"x": x, "note": "é"},
            "output": output,
        }
        | changes
    )


def outcome(id_: str, stream: str, hour: float, answer: str = "yes", **changes: Any) -> bytes:
    """An outcome as JSON."""
    event = {"prediction_id": id_, "stream": stream, "observed_at": _instant(hour), "values": {"answer": answer}}
    return encode(event | changes)


def _outcomes(rng: random.Random, id_: str, stream: str, said: float) -> Iterator[Sending]:
    """None, one or several; some twice, some revised, with the older one coming last, some after the horizon."""
    soon, usual, late = rng.uniform(0.001, 0.01), rng.expovariate(1 / 3), rng.uniform(HORIZON, HORIZON + 4)
    observed = said + rng.choice([soon, usual, usual, late])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        source = {"source": "survey"} if rng.random() < 0.2 else {}
        value = outcome(id_, stream, observed, rng.choice(["yes", "no"]), **source)
        for _ in range(rng.choice([1, 1, 1, 2])):
            yield Sending(_sent(rng, observed, 0.9), "outcomes", id_.encode(), value)
        observed += rng.choice([0.2, 4.0])


def _loan(rng: random.Random, loan: str) -> Iterator[Sending]:
    """Some predictions for a loan, and outcomes that name only it: before the first, between them, long after."""
    key = loan.encode()
    for n in range(rng.choice([0, 1, 2, 3])):
        said = rng.uniform(0, PREDICTING)
        value = prediction(f"{loan}-{n}", BY_LOAN, said, entity=loan)
        for _ in range(rng.choice([1, 1, 1, 2])):
            yield Sending(_sent(rng, said, 0.9), "predictions", key, value)
    for _ in range(rng.choice([0, 1, 2, 3])):
        observed = rng.uniform(0, PREDICTING + HORIZON)
        value = encode(
            {
                "entity": loan,
                "stream": BY_LOAN,
                "observed_at": _instant(observed),
                "values": {"answer": rng.choice(["yes", "no"])},
            }
        )
        for _ in range(rng.choice([1, 1, 1, 2])):
            yield Sending(_sent(rng, observed, 0.9), "outcomes", key, value)


def _poison(rng: random.Random, id_: str, stream: str, hour: float) -> Sending:
    """A record that breaks its contract in one way."""
    key = id_.encode()
    topic, key_, value = rng.choice(
        [
            ("predictions", key, b"not json"),
            ("outcomes", None, None),
            ("outcomes", key, b'{"prediction_id": "\xff"}'),
            ("predictions", key, encode({"prediction_id": id_, "stream": stream})),
            ("outcomes", key, outcome(id_, stream, hour, observed_at=17)),
            ("predictions", key, prediction(id_, stream, hour, v=9)),
            ("outcomes", key, outcome(id_, "nowhere", hour)),
            ("predictions", b"other", prediction(id_, stream, hour)),
            ("outcomes", key, outcome(id_, stream, hour, observed_at="2099-01-01T00:00:00Z")),
            ("predictions", key, prediction(id_, stream, hour, inputs={"x": None})),
            ("predictions", key, prediction(id_, stream, hour, output={"label": "yes"})),
            ("outcomes", key, outcome(id_, stream, hour, "perhaps")),
        ]
    )
    return Sending(_sent(rng, hour, 0.5), "predictions" if topic == "predictions" else "outcomes", key_, value)


def _tides() -> Iterator[Sending]:
    """For each stream and partition a prediction with its outcome, from far later."""
    for stream in LATE:
        for partition in range(PARTITIONS):
            names = (f"tide-{stream}-{n}" for n in count())
            id_ = next(name for name in names if partition_of(name.encode(), PARTITIONS) == partition)
            yield Sending(TIDE, "predictions", id_.encode(), prediction(id_, stream, TIDE))
            yield Sending(TIDE, "outcomes", id_.encode(), outcome(id_, stream, TIDE + 0.1))
    for partition in range(PARTITIONS):
        names = (f"tide-{BY_LOAN}-{n}" for n in count())
        loan = next(name for name in names if partition_of(name.encode(), PARTITIONS) == partition)
        yield Sending(TIDE, "predictions", loan.encode(), prediction(f"{loan}-0", BY_LOAN, TIDE, entity=loan))


def _elsewhere(rng: random.Random, id_: str) -> int:
    return (partition_of(id_.encode(), PARTITIONS) + rng.randrange(1, PARTITIONS)) % PARTITIONS


def _sent(rng: random.Random, hour: float, up_to: float) -> float:
    """An event that happened at `hour` is sent then or up to so many hours later, less than the contract's disorder."""
    return hour + rng.uniform(0, up_to)


def _instant(hour: float) -> datetime:
    return START + timedelta(seconds=round(hour * 3600, 3))
