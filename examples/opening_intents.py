"""Real utterances with their intents, asked over three months of which new intents keep opening.

The utterances and their intents are real; when they were asked is not known, so times are drawn, seeded
(`drawn_times.py`): those intents that the contract names are there at launch, the others open one by one over the
first 70% of the time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from accrual.contract import Contract
from examples.case import Case
from examples.drawn_times import Values, case_at

_OPENING_ENDS = 0.7


def asked_over_time(
    utterances: Sequence[tuple[str, str]], contract: Contract, rows: int, seed: int, opened_per_row: float
) -> list[Case]:
    """`rows` utterances, of (text, intent), in the order they are asked.

    With fewer rows fewer intents open, at the same rate.
    """
    rng = random.Random(seed)
    launched = dict.fromkeys(contract.output.classes, 0.0)
    later = sorted({intent for _, intent in utterances} - launched.keys())
    rng.shuffle(later)
    opening = later[: round(rows * _OPENING_ENDS * opened_per_row)]
    opens = launched | {intent: _OPENING_ENDS * (n + 1) / len(opening) for n, intent in enumerate(opening)}
    known = [(text, intent) for text, intent in utterances if intent in opens]
    asked = sorted(
        (rng.uniform(opens[intent], 1.0), text, intent) for text, intent in rng.sample(known, min(rows, len(known)))
    )
    return [_case(rng, moment, text, intent, opens) for moment, text, intent in asked]


def _case(rng: random.Random, moment: float, text: str, intent: str, opens: dict[str, float]) -> Case:
    def wrong() -> Values:
        others = [other for other, opened in opens.items() if opened <= moment and other != intent]
        return {"intent": rng.choice(others)}

    return case_at(rng, moment, {"text": text}, {"intent": intent}, wrong)
