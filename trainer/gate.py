"""The gate: does the challenger earn its place? Pure: numbers in, a verdict out.

Challenger and champion, both frozen before the judged rows were sealed, score the same rows. With g the champion's
Brier score less the challenger's on a row, the claim to refute is "the challenger is no better": each g has mean at
most 0 given what came before. A gambler who stakes a share b of the wealth on every row, at odds that are fair under
that claim, ends with the product of (1 + b g). It is never negative, as g lies in [-2, 2] and b below 1/2, and its
expectation never rises under the claim, so (Ville 1939) the chance that it *ever* reaches 1/alpha is at most alpha: one
may look after every window and go on. Which stake is best depends on the unknown gain, so the money is spread evenly
over several; their mean is again such a wealth.

    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86(1)
    Ramdas, Grünwald, Vovk and Shafer 2023, "Game-theoretic statistics and safe anytime-valid inference", Stat. Sci. 38
    Choe and Ramdas 2024, "Comparing sequential forecasters", Operations Research 72(4)

Each challenger has its own share of alpha, 6 / (pi n)^2 for the n-th; the shares sum to 1, so that over the stream's
whole life the chance of publishing one that is no better stays below `gate.alpha`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.contract import Gate

# Shares of the wealth staked on each row. The best one is about mean / variance of the gain; with steps of two, one of
# them is near enough, and six of them cost at most a factor of six.
STAKES = (0.48, 0.24, 0.12, 0.06, 0.03, 0.015)
# A challenger that is worse is given up at this evidence; that publishes nothing, so no alpha is spent on it.
CLEARLY_WORSE = 20.0
_LARGEST = 690.0  # the logarithm of what a double still holds


class Verdict(msgspec.Struct, frozen=True):
    """`e_value`: the evidence so far that the challenger is better; `reason` is for a person."""

    verdict: Literal["promote", "reject", "wait"]
    e_value: float
    reason: str


def judge(gains: Sequence[NDArray[np.float64]], nth: int, ece_increase: float, gate: Gate) -> Verdict:
    """The verdict on the `nth` challenger of a stream (counted from 1) after some windows.

    `gains`: for each judged window the rows' champion's Brier score less the challenger's. `ece_increase`: the
    challenger's calibration error on those rows less the champion's.
    """
    rows = np.concatenate(gains)
    evidence, against = wealth(rows), wealth(-rows)
    needed = 1 / spent_alpha(gate.alpha, nth)
    gain = f"Brier lower by {rows.mean():+.4f} a row over {len(rows)} rows; evidence {evidence:.3g} of {needed:.3g}"
    if evidence >= needed:
        if ece_increase > gate.max_ece_increase:
            return Verdict(
                "reject",
                evidence,
                f"{gain}, but calibration is worse: ECE rose by {ece_increase:.4f}, allowed {gate.max_ece_increase}",
            )
        return Verdict("promote", evidence, gain)
    if against >= CLEARLY_WORSE:
        return Verdict("reject", evidence, f"{gain}; evidence that it is worse: {against:.3g}")
    if len(gains) >= gate.patience:
        return Verdict(
            "reject", evidence, f"{gain}; undecided after {len(gains)} windows, the patience of the contract"
        )
    return Verdict("wait", evidence, f"{gain}; window {len(gains)} of {gate.patience}")


def wealth(gains: NDArray[np.float64]) -> float:
    """What one unit of money became: an e-value against "the mean gain is at most 0". 1 without rows.

    `gains` lie in [-2, 2]; raises ValueError otherwise, since the guarantee rests on it.
    """
    if len(gains) and not (np.abs(gains) <= 2.0).all():
        raise ValueError("a difference of two Brier scores lies in [-2, 2]")
    ends = [np.log1p(stake * gains).sum() for stake in STAKES]
    largest = max(ends)
    mean = largest + math.log(sum(math.exp(end - largest) for end in ends) / len(STAKES))
    return math.exp(min(mean, _LARGEST))


def spent_alpha(alpha: float, nth: int) -> float:
    """The share of `alpha` that the `nth` judged challenger has; the shares of all of them sum to `alpha`."""
    return alpha * 6 / (math.pi * nth) ** 2
