"""Plan: what the next step of a stream is, and why. It reads the lake and the ledger, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from accrual.contract import Contract
from accrual.errors import LedgerLost
from accrual.lake import Lake
from accrual.ledger import Evaluation, Generation, Run
from trainer.evaluate import Scored
from trainer.generations import candidates_of
from trainer.publish import Said
from trainer.select import Window
from trainer.triggers import Before, Facts, decide

# Of rows that the champion learned from: those whose label is another by now, those that were erased, and those that
# were put in quarantine since. What it saw is what its newest window's snapshot showed.
_RECALLED = """
with learned as (
    select from_time, to_time, reached, sealed_at from windows
    where stream = $stream and list_contains($windows::int[], "window")
),
seen as (select max(to_time) as until, arg_max(reached, to_time) as reached, max(sealed_at) as at from learned),
labels as (
    select prediction_id,
        arg_max(label, revision) filter ("offset" < coalesce(reached["partition" + 1], 0)) as taught,
        arg_max(label, revision) as label
    from ground_truth_history, seen
    where stream = $stream and predicted_at < until
    group by prediction_id having count(*) filter ("offset" < coalesce(reached["partition" + 1], 0)) > 0
)
select (select count(*) from labels where taught is distinct from label)
    + (select count(distinct prediction) from erasures, seen
       where stream = $stream and list_contains($windows::int[], "window") and erasures."at" > seen.at)
    + (select count(distinct prediction_id) from quarantined join labels using (prediction_id), seen
       where stream = $stream and state <> 'released' and quarantined."at" > seen.at
           and taught is not distinct from label) as rows
"""
_DRIFT = """
with latest as (
    select field, value from quality
    where stream = $stream and metric = $metric and "window" > $after and "window" <= $last
        and ($field::varchar is null or field = $field)
    qualify row_number() over (partition by "window", field order by "at" desc) = 1
)
select field, value from latest order by value desc, field limit 1
"""


class Plan(msgspec.Struct, frozen=True):
    """`judge`: the one in `windows` judges the challenger. `train`: they are new to the champion. `wait`: neither."""

    step: Literal["judge", "train", "wait"]
    windows: list[Window]
    reason: str


def plan_of(
    said: Said,
    contract: Contract,
    windows: Sequence[Window],
    facts_of: Callable[[Sequence[Window]], Facts],
    now: datetime,
    by_hand: bool = False,
) -> Plan:
    """The next step. `windows`: the sealed ones, in order; `facts_of` is asked with those that are new.

    A challenger is judged on the first window of whose time neither it nor its champion has learned anything.
    """
    stream = contract.stream
    champion, challenger = said.champion(stream), said.challenger(stream)
    learned = champion.windows if champion else []
    if challenger is not None:
        known = max({*challenger.windows, *learned, *said.judged(challenger.run_id)})
        model = f"{stream}@{challenger.version}"
        for window in windows:
            if window.window > known and all(_knows_nothing_of(window, of) for of in (champion, challenger)):
                return Plan("judge", [window], f"window {window.window} judges {model}")
        return Plan("wait", [], f"for a sealed window, which judges {model}")
    new = [window for window in windows if window.window > max(learned, default=0)]
    if by_hand and windows:
        return Plan("train", new or [windows[-1]], "by hand")
    if not new or new[-1].window <= said.last_tried(stream):
        return Plan("wait", [], "for a sealed window")
    decision = decide(contract.training.triggers, facts_of(new), runs_before(said, stream), now)
    return Plan("train" if decision.train else "wait", new, decision.reason)


def check_ledger(lake: Lake, stream: str) -> None:
    """Of a stream that the ledger knows no champion of. Raises LedgerLost when the lake knows a generation of it: what
    the lake has was in the topics.
    """
    known = lake.rows("select model from generations where stream = ? order by version desc limit 1", [stream])
    if known:
        raise LedgerLost(
            f"the topics know no model of {stream}, and the lake knows {known[0]['model']}: the topics were lost, or"
            " topics.prefix or kafka.bootstrap_servers is another than it was. Restore them; a new beginning needs a"
            " lake of its own"
        )


def runs_before(said: Said, stream: str) -> list[Before]:
    """The runs of a stream, in order."""
    return [Before(begun, run.seconds, _gain(run, said.evaluations(run.run_id))) for run, begun in said.begun(stream)]


def gather(
    lake: Lake,
    said: Said,
    contract: Contract,
    windows: Sequence[Window],
    new: Sequence[Window],
    rises: Callable[[Window], tuple[float | None, float | None]],
) -> Facts:
    """The facts that the contract's triggers ask for; the others are left at nothing.

    `rises`: how much worse the champion is on a window than when it was promoted, by Brier score and by ECE.
    """
    stream, triggers = contract.stream, contract.training.triggers
    last = said.last_tried(stream)
    begin = max((window.to_time for window in windows if window.window <= last), default=windows[0].to_time)
    drift, drift_of, recalled = 0.0, "", 0
    if triggers.drift is not None:
        asked = {"stream": stream, "metric": triggers.drift.metric, "field": triggers.drift.field}
        for row in lake.rows(_DRIFT, {**asked, "after": last, "last": new[-1].window}):
            drift, drift_of = row["value"], row["field"]
    champion = said.champion(stream)
    if triggers.recalled is not None and champion is not None and champion.windows:
        recalled = lake.rows(_RECALLED, {"stream": stream, "windows": champion.windows})[0]["rows"]
    brier_rise, ece_rise = (None, None) if triggers.decline is None else rises(new[-1])
    return Facts(
        rows=sum(window.trainable for window in new if window.window > last),
        passed=new[-1].to_time - begin,
        drift=drift,
        drift_of=drift_of,
        brier_rise=brier_rise,
        ece_rise=ece_rise,
        recalled=recalled,
    )


def rises_of(
    said: Said, stream: str, scored: Callable[[Generation, Window], Scored], on: Window
) -> tuple[float | None, float | None]:
    """How much worse the champion is on a window, as `scored` finds it there, than on the one that it was promoted by.

    By Brier score and by calibration error, without what chance adds to it: windows are of different sizes. Not known
    of a generation 0, which nothing has judged.
    """
    champion = said.champion(stream)
    then = [e for e in said.evaluations(champion.run_id) if e.role == "challenger"] if champion else []
    if champion is None or not then:
        return None, None
    now, error = scored(champion, on).judged, then[-1].calibration_error
    return float(now.brier.mean()) - then[-1].brier, None if error is None else now.calibration_error - error


def _knows_nothing_of(window: Window, model: Generation | Run | None) -> bool:
    return model is None or model.learned_until is None or window.from_time >= model.learned_until


def _gain(run: Run, evaluations: Sequence[Evaluation]) -> float | None:
    """By how much a run's model lowered the Brier score of a row, over all windows that judged it."""
    if run.state != "promoted":
        return None if run.state in ("trained", "waiting") else 0.0
    [one] = candidates_of([run], evaluations, [])
    return one.gain or 0.0
