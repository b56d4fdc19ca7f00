"""What the data do not say of a case, drawn and seeded: when it is asked, and when and how it is answered.

Cases are asked within three months. Who answers does so hours to days later (log-normal, median ten hours); 2% are
never answered, 1% are answered wrongly first and corrected, 1% are answered twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from examples.case import Case

Values = dict[str, Any]

_START = datetime(2026, 1, 5, tzinfo=UTC)
_SPAN = timedelta(days=90)
_MEDIAN_DELAY = timedelta(hours=10)


def spread(known: Sequence[tuple[Values, Values]], rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` of what is `known`, of (inputs, outcome), evenly over the time, in order.

    A wrong answer is that of another row.
    """
    rng = random.Random(seed)
    sample = rng.sample(known, min(rows, len(known)))
    moments = sorted(rng.random() for _ in sample)

    def other(than: Values) -> Values:
        return rng.choice([values for _, values in known if values != than])

    return [
        case_at(rng, moment, inputs, values, partial(other, values))
        for moment, (inputs, values) in zip(moments, sample, strict=True)
    ]


def case_at(rng: random.Random, moment: float, inputs: Values, right: Values, wrong: Callable[[], Values]) -> Case:
    """A case asked at `moment`, from 0 to 1 of the time, with its answers: none, the right one, or two.

    `wrong` draws a wrong answer where there is one.
    """
    asked_at = _START + moment * _SPAN
    answered_at = asked_at + _delay(rng)
    outcomes = [(answered_at, right)]
    chance = rng.random()
    if chance < 0.02:
        outcomes = []
    elif chance < 0.03:
        outcomes = [(answered_at, wrong()), (answered_at + _delay(rng), right)]
    elif chance < 0.04:
        outcomes *= 2
    return Case(asked_at, inputs, outcomes)


def _delay(rng: random.Random) -> timedelta:
    return _MEDIAN_DELAY * rng.lognormvariate(0.0, 1.0)
