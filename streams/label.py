"""The label of one prediction, pure: what several outcomes say together by the contract's rule.

Everything here is a function of the set of outcomes. They have a total order (`Seen`), and a label, once there, stays a
label whatever comes besides: it may change, but an outcome takes none back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec

from accrual.expression import half_away
from accrual.label_rule import Label


class Seen(msgspec.Struct, frozen=True, array_like=True, gc=False, order=True):
    """The content of an outcome, and what it says: a label, or the number to add. They order by when they were seen."""

    observed_at: int
    values: bytes
    source: str
    says: str


class Decision(msgspec.Struct, frozen=True, gc=False):
    """A label, and the outcome that its ground-truth row shows: of those that decided, the one observed last."""

    label: str
    outcome: Seen


def is_same(one: Seen, other: Seen) -> bool:
    """Whether they are the same outcome: what it says follows from the rest, by a contract that may have changed."""
    return one.observed_at == other.observed_at and one.values == other.values and one.source == other.source


def keep(rule: Label, outcomes: tuple[Seen, ...]) -> tuple[Seen, ...]:
    """Of the outcomes that count, those on which the label can still depend, whatever comes; in order.

    Of what was kept before and new ones it keeps the same as of all of them.
    """
    if len(outcomes) == 1:
        return outcomes
    if rule.sources and rule.take != "sum":
        best = min(_rank(rule, seen) for seen in outcomes)
        outcomes = tuple(seen for seen in outcomes if _rank(rule, seen) == best)
    if rule.take == "last":
        return (max(outcomes),)
    return (min(outcomes),) if rule.take == "first" else tuple(sorted(outcomes))


def decide(rule: Label, kept: Sequence[Seen], count: int) -> Decision | None:
    """The label by the outcomes that were kept of `count`, or None: they are too few, or add up to too little."""
    if count < rule.complete_when:
        return None
    if rule.take == "sum":
        return _highest_reached(rule, kept)
    if rule.take == "majority":
        return _most_frequent(kept)
    [seen] = kept if len(kept) == 1 else keep(rule, tuple(kept))  # by another rule more may have been kept
    return Decision(seen.says, seen)


def _most_frequent(kept: Sequence[Seen]) -> Decision:
    """Of labels that are equally frequent, the one observed last."""
    votes: defaultdict[str, list[Seen]] = defaultdict(list)
    for seen in kept:
        votes[seen.says].append(seen)
    label, voters = max(votes.items(), key=lambda vote: (len(vote[1]), vote[1][-1]))
    return Decision(label, voters[-1])


def _highest_reached(rule: Label, kept: Sequence[Seen]) -> Decision | None:
    """By the best source that reaches a threshold. Sums are in whole millionths: exact, in any order."""
    groups: defaultdict[int, list[Seen]] = defaultdict(list)
    for seen in kept:
        groups[_rank(rule, seen)].append(seen)
    for _, group in sorted(groups.items()):
        total = sum(int(half_away(float(seen.says) * 1e6)) for seen in group)
        for floor, label in rule.floors:
            if total >= floor:
                return Decision(label, group[-1])
    return None


def _rank(rule: Label, seen: Seen) -> int:
    return rule.ranks.get(seen.source, len(rule.ranks))
