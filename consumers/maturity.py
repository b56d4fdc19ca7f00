"""Maturity: which share of a stream's labels has come by a given age, as measured.

How long labels take is learned from all predictions of the stream, the unanswered ones too: those say that it takes
longer than they are old. That is the product-limit estimator of Kaplan and Meier (1958, "Nonparametric estimation from
incomplete observations", J. Am. Stat. Assoc. 53, eq. 2b), here over steps of a thousandth of the horizon; a prediction
that is still open drops out after the step that its age is in. A label that no one will give any more at the
horizon never comes: shares are of the labels that do.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from accrual.contract import Contract
from accrual.lake import Lake

STEPS = 1_000
FEWEST_AT_RISK = 20  # predictions that must have reached an age before the curve is trusted there

# Every prediction once: the step its label came in, or the one in which it was last seen without.
_LIFETIMES = f"""
with first_labels as (
    select prediction_id, min(observed_at) as observed_at from ground_truth_history
    where stream = $stream and status = 'labeled' group by all
),
predicted as (
    select prediction_id, min(predicted_at) as predicted_at from predictions where stream = $stream group by all
),
lives as (
    select observed_at is not null and observed_at <= least($watermark, predicted_at + to_microseconds($horizon_us))
            as labeled,
        case when labeled then observed_at else $watermark end - predicted_at as age
    from predicted left join first_labels using (prediction_id)
    where predicted_at <= $watermark
)
select least(greatest(epoch_us(age), 0) * {STEPS} // $horizon_us, {STEPS})::integer as step,
    count(*) filter (labeled) as labels, count(*) filter (not labeled) as open
from lives group by all order by step
"""

_AGES = f"""
select least(greatest(epoch_us($watermark - predicted_at), 0) * {STEPS} // $horizon_us, {STEPS})::integer as step,
    count(distinct prediction_id) as predictions
from predictions
where stream = $stream and predicted_at >= $since and predicted_at < $until
group by all
"""


class Curve(msgspec.Struct, frozen=True):
    """The share of labels to come that have come by the end of each step of the horizon; the last entry is 1.

    `shares` is empty while too few predictions have been watched for as long as the horizon.
    """

    horizon_us: int
    shares: list[float]

    def age_us(self, share: float) -> int:
        """The age, in microseconds, at which this share of the labels has come; the horizon while that is unknown."""
        for step, reached in enumerate(self.shares):
            if reached >= share:
                return min((step + 1) * self.horizon_us // STEPS, self.horizon_us)
        return self.horizon_us

    def at(self, step: int) -> float | None:
        """The share that has come by a prediction's age in steps; None while that is unknown."""
        if step >= STEPS:
            return 1.0
        if not self.shares:
            return None
        return self.shares[step - 1] if step > 0 else 0.0  # the step that an age is in is not over


def delay_curve(lake: Lake, contract: Contract, watermark: datetime) -> Curve:
    """Estimate a stream's curve from everything the lake holds of it up to `watermark`."""
    lives = lake.rows(
        _LIFETIMES, {"stream": contract.stream, "watermark": watermark, "horizon_us": contract.horizon_us}
    )
    return estimate(contract.horizon_us, {life["step"]: (life["labels"], life["open"]) for life in lives})


def estimate(horizon_us: int, lives: dict[int, tuple[int, int]]) -> Curve:
    """The curve from counts by step: labels that came in it, and predictions last seen open in it."""
    at_risk = sum(labels + still_open for labels, still_open in lives.values())
    open_share, shares = 1.0, []
    for step in range(STEPS):
        labels, still_open = lives.get(step, (0, 0))
        if labels:
            if at_risk < FEWEST_AT_RISK and open_share > 1 / FEWEST_AT_RISK:
                return Curve(horizon_us, [])
            open_share *= 1 - labels / at_risk
        at_risk -= labels + still_open
        shares.append(1 - open_share)
    if (at_risk < FEWEST_AT_RISK and open_share > 1 / FEWEST_AT_RISK) or not shares[-1]:
        return Curve(horizon_us, [])
    return Curve(horizon_us, [share / shares[-1] for share in shares])


def maturity(
    lake: Lake, contract: Contract, watermark: datetime, since: datetime, until: datetime | None
) -> float | None:
    """Of the labels that will come for predictions of a stretch of time, the share expected to be there by `watermark`.

    None while the curve is unknown for some of them, or without predictions.
    """
    curve = delay_curve(lake, contract, watermark)
    ages = lake.rows(
        _AGES,
        {
            "stream": contract.stream,
            "since": since,
            "until": until or watermark,
            "watermark": watermark,
            "horizon_us": contract.horizon_us,
        },
    )
    total = expected = 0.0
    for age in ages:
        share = curve.at(age["step"])
        if share is None:
            return None
        total += age["predictions"]
        expected += share * age["predictions"]
    return expected / total if total else None
