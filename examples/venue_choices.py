"""The guide lets people choose: 1,091 pairs of two systems' sentences of one place, one of which was rated higher."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import combinations

from accrual.contract import Contract
from examples import venue_replies
from examples.case import Case
from examples.drawn_times import Values, spread

ROWS = 1_091


def cases(_: Contract, rows: int, seed: int) -> list[Case]:
    """A seeded sample of `rows` pairs in the order they are shown; which one is first is drawn too."""
    rng, pairs = random.Random(seed), list[tuple[Values, Values]]()
    by_place = defaultdict(list)
    for row in venue_replies.read():
        by_place[row["set"], row["act"], row["known"]].append(row)
    for of_place in by_place.values():
        for one, other in combinations(of_place, 2):
            better = sum(venue_replies.ratings(one).values()) - sum(venue_replies.ratings(other).values())
            if one["system"] == other["system"] or one["text"] == other["text"] or not better:
                continue
            if rng.random() < 0.5:
                one, other, better = other, one, -better
            shown = venue_replies.asked(one) | {"first": one["text"], "second": other["text"]}
            pairs.append((shown, {"chosen": "first" if better > 0 else "second"}))
    return spread(pairs, rows, seed)
