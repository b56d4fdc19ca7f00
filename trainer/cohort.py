"""Cohorts: what to do about predictions that are too young for all their labels to have come.

A window is a cohort that has matured, and by default nothing else is learned from. `training.cohort` may be otherwise:

    observed   every label that has come. What comes early is not like the rest, so this learns the wrong shares
    ipw        the same rows, each weighted by the inverse of the probability that a label of its delay has come

Of predictions whose ages are those of the cohort, a label that takes `delay` has come for the share that is as old as
that, whatever the delays are: with G(delay) = share of predictions with age >= delay, a row that counts 1 / G(delay)
stands for itself and for those like it that are still open. That is Horvitz and Thompson's estimator (1952, "A
generalization of sampling without replacement from a finite universe", J. Am. Stat. Assoc. 47) for censored times
(Robins and Rotnitzky 1992, "Recovery of information and adjustment for dependent censoring using surrogate markers").
G would be the Kaplan-Meier estimate of the censoring; here every prediction's age is known, labeled or not, so it is
simply counted. It holds as far as delay and age are independent: as long as labels do not take longer, or become
others, from month to month.

The rows must reach back to predictions as old as the horizon, or the slowest labels are not there at all: the mature
window among them is for that. A weight is at most `MOST_WEIGHT`, since one row must not decide a model; the weights are
then scaled to a mean of 1 (self-normalised, as Hájek 1971 proposed).
"""

from __future__ import annotations

from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from accrual.contract import Contract
from accrual.lake import Lake
from trainer.weigh import MOST_WEIGHT

_AGES = """
select epoch_us($reached - min(predicted_at)) as age from predictions
where stream = $stream and predicted_at >= $since and predicted_at <= $reached
    and not (predicted_at >= $apart and predicted_at < $until)
group by prediction_id
"""


def arrival_weights(delays_us: NDArray[np.int64], ages_us: NDArray[np.int64]) -> NDArray[np.float64]:
    """The weight of each labeled row, by how long its label took; `ages_us` are those of all predictions meant.

    At most `MOST_WEIGHT` before they are scaled to a mean of 1. `ages_us` is not empty where there are rows.
    """
    if not len(delays_us):
        return np.ones(0)
    younger = np.searchsorted(np.sort(ages_us), delays_us, side="left")
    share = 1 - younger / max(1, len(ages_us))
    weights = 1 / np.maximum(share, 1 / MOST_WEIGHT)
    return np.asarray(weights / weights.mean(), dtype=np.float64)


def ages_of(
    lake: Lake, contract: Contract, reached: datetime, since: datetime, apart: datetime, until: datetime
) -> NDArray[np.int64]:
    """How old, in microseconds at `reached`, all predictions from `since` on are; but for those of `apart` to `until`,
    whose labeled rows are kept for something else.
    """
    asked = {"stream": contract.stream, "reached": reached, "since": since, "apart": apart, "until": until}
    return np.asarray(lake.arrow(_AGES, asked)["age"].to_numpy(), dtype=np.int64)
