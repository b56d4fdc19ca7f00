"""Real utterances with their intents, asked over three months of which new intents keep opening.

The utterances and their intents are real; when they were asked is not known, so times are drawn, seeded: those intents
that the contract names are there at launch, the others open one by one over the first 70% of the time. Who handled an
utterance files its intent hours to days later (log-normal, median ten hours); 2% are never filed, 1% are filed wrongly
first and corrected, 1% are filed twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from accrual.contract import Contract
from examples.case import Case

_START = datetime(2026, 1, 5, tzinfo=UTC)
_SPAN = timedelta(days=90)
_OPENING_ENDS = 0.7
_MEDIAN_DELAY = timedelta(hours=10)


def asked_over_time(
    utterances: Sequence[tuple[str, str]], contract: Contract, rows: int, seed: int, opened_per_row: float
) -> list[Case]:
    """`rows` utterances, of (text, intent), in the order they are asked.

    With fewer rows fewer intents open, at the same rate.
    """
    rng = random.Random(seed)
    launched = set(contract.output.classes)
    later = sorted({intent for _, intent in utterances} - launched)
    rng.shuffle(later)
    opening = later[: round(rows * _OPENING_ENDS * opened_per_row)]
    opens = dict.fromkeys(launched, 0.0) | {
        intent: _OPENING_ENDS * (n + 1) / len(opening) for n, intent in enumerate(opening)
    }
    known = [(text, intent) for text, intent in utterances if intent in opens]
    asked = sorted(
        (rng.uniform(opens[intent], 1.0), text, intent) for text, intent in rng.sample(known, min(rows, len(known)))
    )
    return [_case(rng, moment, text, intent, opens) for moment, text, intent in asked]


def _case(rng: random.Random, moment: float, text: str, intent: str, opens: dict[str, float]) -> Case:
    asked_at = _START + moment * _SPAN
    filed_at = asked_at + _delay(rng)
    outcomes: list[tuple[datetime, dict[str, Any]]] = [(filed_at, {"intent": intent})]
    chance = rng.random()
    if chance < 0.02:
        outcomes = []
    elif chance < 0.03:
        wrong = rng.choice([other for other, opened in opens.items() if opened <= moment and other != intent])
        outcomes = [(filed_at, {"intent": wrong}), (filed_at + _delay(rng), {"intent": intent})]
    elif chance < 0.04:
        outcomes *= 2
    return Case(asked_at, {"text": text}, outcomes)


def _delay(rng: random.Random) -> timedelta:
    return _MEDIAN_DELAY * rng.lognormvariate(0.0, 1.0)
