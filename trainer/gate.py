"""The gate: does the challenger earn its place? Pure: numbers in, a verdict out.

Challenger and champion, both frozen before they were judged, score the same rows. Let g be the champion's
Brier score of a row less the challenger's, and e what g is expected to be, given all rows before and what both models
say of the window's. The claim to refute is "the challenger is no better": in no window is the mean of e above 0. A
gambler who stakes a share b of the wealth on every row ends with the product of (1 + b g). Divided by that of
(1 + b e) this is a fair game; and that of (1 + b e) is at most 1 under the claim, as a product of numbers is never
above the power of their mean. So (Ville 1939) the chance that the wealth *ever* reaches 1/alpha is at most alpha: one
may look after every window and go on. Which stake is best depends on the unknown gain, so the money is spread evenly
over several; their mean is again such a wealth.

No row may take more than there is. Differences of Brier scores lie in [-2, 2], which allows stakes below 1/2. But what
both models say of a window's rows is known before the labels count, and so is the most that one of them can lose: where
6% stand against 10% that is 0.013. So each window's stakes may be as high as its rows allow. Rare events ask for that:
forecasts differ little there, and the best stake, about mean / variance of g, is above 1/2. All rows of a window have
the same stake, since the claim is about their mean. Where rows count less than others, by what is known of them before
their labels, g is multiplied by that share: the claim is then about the weighted mean.

    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86(1)
    Ramdas, Grünwald, Vovk and Shafer 2023, "Game-theoretic statistics and safe anytime-valid inference", Stat. Sci. 38
    Choe and Ramdas 2024, "Comparing sequential forecasters", Operations Research 72(4)

Each challenger has its own share of alpha, 6 / (pi n)^2 for the n-th; the shares sum to 1, so that over the stream's
whole life the chance of publishing one that is no better stays below `gate.alpha`.

A model that is better on the whole may be worse for some. So in each slice the same bet refutes "its Brier score is
above the champion's by m or more": each g + m has mean at most 0. The least m that is refuted is a bound on the loss
that holds at whatever time one looks. A challenger is promoted only if the bound of every slice with enough rows is
within the contract's margin, and rejected if the bet the other way says of any slice that the loss is beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.training_policy import Gate, Slices

# Shares of the wealth staked on each row, or less where a row could then lose more than `_AT_RISK` of it. With steps of
# two, one of them is near enough to the best, and seven of them cost at most a factor of seven.
STAKES = (1.92, 0.96, 0.48, 0.24, 0.12, 0.06, 0.03)
_AT_RISK = 0.96
# A challenger that is worse is given up at this evidence; that publishes nothing, so no alpha is spent on it.
CLEARLY_WORSE = 20.0
_LARGEST = 690.0  # the logarithm of what a double still holds
LARGEST_LOSS = 2.0  # of any row, whatever was said of it
_ROUNDING = 1e-9
_NAMED = 5  # slices, in a reason

Gains = NDArray[np.float64]  # [rows]: the champion's Brier score less the challenger's
Counts = NDArray[np.float64]  # [rows]


class Verdict(msgspec.Struct, frozen=True):
    """`e_value`: the evidence so far that the challenger is better; `reason` is for a person.

    `loss_at_most`: for each slice with enough rows, by how much its Brier score may be above the champion's.
    """

    verdict: Literal["promote", "reject", "wait"]
    e_value: float
    reason: str
    loss_at_most: dict[str, float] = {}


def judge(
    gains: Sequence[Gains],
    nth: int,
    ece_increase: float,
    gate: Gate,
    slices: Mapping[str, Gains] | None = None,
    losses: Sequence[float] | None = None,
    counts: Sequence[Counts] | None = None,
) -> Verdict:
    """The verdict on the `nth` challenger of a stream (counted from 1) after some windows.

    `gains`: for each judged window the rows' champion's Brier score less the challenger's. `ece_increase`: the
    challenger's calibration error on those rows less the champion's. `slices`: the gains of all judged rows of each
    slice, by its name. `losses`: for each window the most that any of its rows could lose by what both models said of
    it, whatever its label; 2 of all by default. `counts`: for each window how much its rows count as evidence, 0 to 1,
    known before their labels; 1 by default.
    """
    share = np.concatenate(counts or [np.ones(len(window)) for window in gains])
    rows = share * np.concatenate(gains)
    most = np.repeat(losses or [LARGEST_LOSS] * len(gains), [len(window) for window in gains])
    evidence, against = wealth(rows, losses=most), wealth(-rows)
    needed = 1 / spent_alpha(gate.alpha, nth)
    guard = _guard(slices or {}, gate.slices, gate.alpha)
    mean = rows.sum() / share.sum()
    gain = f"Brier lower by {mean:+.4f} a row over {len(rows)} rows; evidence {evidence:.3g} of {needed:.3g}"
    verdict: Literal["promote", "reject", "wait"]
    if against >= CLEARLY_WORSE:
        verdict, why = "reject", f"; evidence that it is worse: {against:.3g}"
    elif guard.worse:
        verdict, why = "reject", f", but worse by more than is allowed in {_listed(guard.worse)}"
    elif evidence >= needed and ece_increase > gate.max_ece_increase:
        allowed = gate.max_ece_increase
        verdict, why = "reject", f", but calibration is worse: the error rose by {ece_increase:.4f}, allowed {allowed}"
    elif evidence >= needed and not guard.undecided:
        verdict, why = "promote", ""
    elif len(gains) >= gate.patience:
        verdict, why = "reject", f"; undecided after {len(gains)} windows, the patience of the contract"
    else:
        verdict, why = "wait", f"; window {len(gains)} of {gate.patience}"
    if guard.undecided and verdict in ("wait", "reject") and not guard.worse:
        why += f"; may still be worse by more than is allowed in {_listed(guard.undecided)}"
    if guard.too_few:
        why += f"; too few rows to be sure of {_listed(guard.too_few)}"
    return Verdict(verdict, evidence, gain + why, guard.loss_at_most)


def wealth(gains: Gains, margin: float = 0.0, losses: Gains | float = LARGEST_LOSS) -> float:
    """What one unit of money became: an e-value against "the mean gain is at most -`margin`". 1 without rows.

    `losses`: the most that each row could lose, the same for all rows that are bet on together. Raises ValueError for
    gains below `-losses` or above 2, since the guarantee rests on it.
    """
    if not ((gains >= -losses - _ROUNDING) & (gains <= LARGEST_LOSS + _ROUNDING)).all():
        raise ValueError("a difference of two Brier scores lies in [-2, 2], and loses no more than is said")
    most = losses + max(0.0, -margin)  # that a row may lose, beyond the margin
    ends = [np.log1p(stake_of(share, most) * (gains + margin)).sum() for share in STAKES]
    largest = max(ends)
    mean = largest + math.log(sum(math.exp(end - largest) for end in ends) / len(STAKES))
    return math.exp(min(mean, _LARGEST))


def stake_of(share: float, most: Gains | float) -> Gains:
    """The stake on rows of which none can lose more than `most`: `share`, or as much as that allows."""
    return np.asarray(np.minimum(share, _AT_RISK / np.maximum(most, _AT_RISK / STAKES[0])))


def loss_at_most(gains: Gains, alpha: float) -> float:
    """By how much the mean loss may be above the champion's, at most; 0 if it is lower.

    A confidence sequence: the chance that it is *ever* below the truth, however often one looks, is at most `alpha`.
    """
    low, high = 0.0, LARGEST_LOSS
    if wealth(gains) >= 1 / alpha:
        return low
    while high - low > 1e-4:  # the wealth rises with the margin
        middle = (low + high) / 2
        low, high = (low, middle) if wealth(gains, middle) >= 1 / alpha else (middle, high)
    return high


def gain_within(gains: Gains, alpha: float, most: float = LARGEST_LOSS) -> tuple[float, float]:
    """Between what the mean gain lies, but for a chance of `alpha`: however rows are distributed, and however few.

    `most`: what a row could gain or lose at most, by what both models said of it (Waudby-Smith and Ramdas 2024). Each
    end is the last mean that a bet refutes. Halves are bet on, so that all means have the same stakes, and what is won
    falls with the mean.
    """

    def at_least(gains: Gains) -> float:
        low, high = -most, most
        while high - low > 1e-4 * most:
            middle = (low + high) / 2
            refuted = wealth((gains - middle) / 2, losses=most) >= 2 / alpha
            low, high = (middle, high) if refuted else (low, middle)
        return low

    return (at_least(gains), -at_least(-gains)) if most > 0 else (0.0, 0.0)


class _Guard(msgspec.Struct, frozen=True):
    """What is known of the slices: `loss_at_most` of those with enough rows, and what follows from it."""

    loss_at_most: dict[str, float]
    worse: list[str]
    undecided: list[str]
    too_few: list[str]


def _guard(slices: Mapping[str, Gains], allowed: Slices | None, alpha: float) -> _Guard:
    """Bounds that hold for all slices together: each has its share of alpha (Bonferroni).

    A slice with few rows has no bound that says anything, but what is evident in it is evident.
    """
    if allowed is None:
        return _Guard({}, [], [], [])
    enough = {name: gains for name, gains in slices.items() if len(gains) >= allowed.least_rows}
    bounds = {name: loss_at_most(gains, alpha / len(enough)) for name, gains in enough.items()}
    beyond = {name: wealth(-gains, -allowed.most_loss) for name, gains in slices.items()}
    worse = [name for name, evidence in beyond.items() if evidence >= CLEARLY_WORSE * len(slices)]
    undecided = [name for name, bound in bounds.items() if bound > allowed.most_loss and name not in worse]
    too_few = [name for name in slices if name not in enough and name not in worse]
    return _Guard(bounds, worse, undecided, too_few)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def spent_alpha(alpha: float, nth: int) -> float:
    """The share of `alpha` that the `nth` judged challenger has; the shares of all of them sum to `alpha`."""
    return alpha * 6 / (math.pi * nth) ** 2
