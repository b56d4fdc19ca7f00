"""The canary stream: rows made to break rules, sent the way that a service's events go, and what became of them.

The canaries of a window (`consumers/canaries.py`) try the rules' SQL. These try everything from the broker to the
quarantine: they come as predictions with their outcomes, of a stream that has the inputs, outcomes and rules of the
real one and no service of its own, and are joined, written, windowed and checked like all else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import BrokerUnavailable, ConfigError, NotFound
from accrual.lake import Lake
from accrual.recorder import Recorder
from consumers.canaries import Canary, hatch

_MADE_OF = 1_000
_DELIVERY_S = 30.0
# The newest rows with an outcome.
_ROWS = """
select inputs, output, "values" from ground_truth where stream = ? and status = 'labeled'
order by predicted_at desc, prediction_id limit ?
"""
# What became of each canary of the last sending. Its id says which rule it breaks: canary/RULE/SENDING/NUMBER.
_FATES = """
with captured as (
    select prediction_id, predicted_at from predictions where stream = $1 and prediction_id like 'canary/%'
),
dropped as (select prediction_id from dead_letters where stream = $1 and prediction_id like 'canary/%'),
last_sending as (
    select max(split_part(prediction_id, '/', 3)) from (select prediction_id from captured union from dropped)
),
sent as (from captured where split_part(prediction_id, '/', 3) = (from last_sending)),
refused as (select distinct prediction_id from dropped where split_part(prediction_id, '/', 3) = (from last_sending)),
held as (
    select distinct prediction_id from quarantined where stream = $1 and rule = split_part(prediction_id, '/', 2)
),
-- Those of sealed windows, and of one that is held back those up to the youngest that was caught.
checked as (
    select prediction_id from sent
    where predicted_at < (select max(to_time) from windows where stream = $1)
        or predicted_at <= (select max(predicted_at) from sent where prediction_id in (from held))
)
select split_part(prediction_id, '/', 2) as rule, count(*) as sent,
    count(*) filter (prediction_id in (from refused)) as refused,
    count(*) filter (prediction_id in (from held) and prediction_id not in (from refused)) as quarantined,
    count(*) filter (prediction_id in (from checked union from held union from refused)) as decided
from (select prediction_id from sent union from refused) group by rule order by rule
"""


class Fate(msgspec.Struct, frozen=True):
    """What became of the canaries of one rule: `refused` ended as dead letters, before the rule could see them.

    `decided` are these and those whose window was checked; the others wait for their window.
    """

    rule: str
    sent: int
    refused: int
    quarantined: int
    decided: int

    @property
    def recall(self) -> float | None:
        """The share of the decided that was stopped; None while none is."""
        return (self.refused + self.quarantined) / self.decided if self.decided else None


def made_for(lake: Lake, contract: Contract, into: Contract) -> list[tuple[Canary, dict[str, Any]]]:
    """Canaries from the newest labeled rows of a stream, each with the output of one of them.

    They are of the rules that put rows into quarantine: one that only warns stops nothing.

    Raises ConfigError when `into` does not stand for the stream, NotFound when no canary can be made.
    """
    _check_stand_in(contract, into)
    quality = into.quality
    if quality is None or quality.canaries is None:
        raise ConfigError(f"contract of {into.stream}: quality.canaries is missing; write canaries: {{rows: 25}}")
    rows = [
        {
            "inputs": contract.decode_inputs(row["inputs"].encode()),
            "values": contract.decode_values(row["values"].encode()),
            "output": msgspec.json.decode(row["output"]),
        }
        for row in lake.rows(_ROWS, [contract.stream, _MADE_OF])
    ]
    stopping = {rule.name for rule in quality.rules if rule.severity == "quarantine"}
    canaries = [canary for canary in hatch(contract, quality.canaries, rows) if canary.rule in stopping]
    if not canaries:
        raise NotFound(f"{contract.stream} has {len(rows)} labeled rows to make canaries of, and none could be made")
    random.Random(quality.canaries.seed).shuffle(canaries)  # so that a window has some of each rule
    return [(canary, rows[n % len(rows)]["output"]) for n, canary in enumerate(canaries)]


def send(config: Config, into: Contract, canaries: Sequence[tuple[Canary, Mapping[str, Any]]]) -> Counter[str]:
    """Send each as a prediction and its outcome; how many of each rule. Raises BrokerUnavailable when one got lost."""
    sending = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    made: Counter[str] = Counter()
    with Recorder(into.stream, config, contract=into) as recorder:
        for canary, output in canaries:
            made[canary.rule] += 1
            prediction_id = f"canary/{canary.rule}/{sending}/{made[canary.rule]}"
            inputs, values = msgspec.json.decode(canary.inputs), msgspec.json.decode(canary.values)
            recorder.predict(inputs, output, model="canary", prediction_id=prediction_id)
            recorder.outcome(prediction_id, values, source="canary")
        recorder.flush(_DELIVERY_S)
        lost = recorder.buffered + recorder.failed + recorder.dropped
    if lost:
        raise BrokerUnavailable(f"{lost} of {2 * len(canaries)} events were not taken by the broker; send them again")
    return made


def fates(lake: Lake, into: Contract) -> list[Fate]:
    """What became of the canaries of the last sending so far, by rule."""
    return msgspec.convert(lake.rows(_FATES, [into.stream]), list[Fate])


def missed(found: Sequence[Fate], into: Contract) -> list[str]:
    """The rules that stopped a smaller share of their canaries than `quality.canaries.recall` asks for."""
    least = into.quality.canaries.recall if into.quality and into.quality.canaries else 1.0
    return [fate.rule for fate in found if fate.recall is not None and fate.recall < least]


def _check_stand_in(contract: Contract, into: Contract) -> None:
    """Raises ConfigError where the canary stream differs from the stream in what the rules see."""
    if contract.stream == into.stream:
        raise ConfigError("--into names the stream itself: canaries go to a stream of their own, never among real rows")
    if contract.join is not None:
        raise ConfigError(f"{contract.stream} is joined by an entity; canaries name their prediction")
    parts: Mapping[str, tuple[Any, Any]] = {
        "inputs": (contract.inputs, into.inputs),
        "outcome.values": (contract.outcome.values, into.outcome.values),
        "quality.rules": (
            contract.quality.rules if contract.quality else [],
            into.quality.rules if into.quality else [],
        ),
    }
    for part, (real, stand_in) in parts.items():
        if real != stand_in:
            raise ConfigError(
                f"contract of {into.stream}: {part} is not what {contract.stream} has; copy it from there, so that the"
                " canaries meet the same checks"
            )
