"""What a run of the demo found: what its table, its report and `--json` show. All of it is read from the lake."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import msgspec

from accrual.contract import Contract
from accrual.lake import Lake
from accrual.lake_views import SCORED

# Accuracy and Brier score of what was served, in forty stretches of equal length by time of prediction.
_LIVE = f"""
    with placed as (
        select model, hit, brier, row_number() over (order by predicted_at, prediction_id) - 1 as place,
               greatest(1, ceil(count(*) over () / 40.0)) as length
        from ({SCORED}) where stream = ?
    )
    select min(place)::int as first, count(*)::int as predictions, arg_max(model, place) as model,
           avg(hit) as accuracy, avg(brier) as brier
    from placed group by floor(place / length) order by first
"""
Measure = Literal["auroc", "rank_correlation", "accuracy"]
NAMES: dict[Measure, str] = {"auroc": "AUROC", "rank_correlation": "rank corr.", "accuracy": "accuracy"}


class Scores(msgspec.Struct, frozen=True):
    """One model on one window. Brier sums over the classes (0 to 2); it, log-loss and ECE are better when lower."""

    model: str
    rows: int
    accuracy: float
    auroc: float | None
    rank_correlation: float | None
    brier: float
    log_loss: float
    ece: float


class Trial(msgspec.Struct, frozen=True):
    """A challenger judged on a window it was not trained on, beside the champion of the time and generation 0."""

    window: int
    challenger: Scores
    champion: Scores
    generation_0: Scores
    windows: list[int]
    rows_new: int
    rows_replayed: int
    e_value: float
    verdict: Literal["promote", "reject", "wait"]
    coverage: float


class Window(msgspec.Struct, frozen=True):
    """A sealed window; `coverage` is the share of its predictions that have a label."""

    window: int
    rows: int
    labeled: int
    coverage: float
    from_time: datetime
    to_time: datetime


class Stretch(msgspec.Struct, frozen=True):
    """Consecutive labeled predictions in service: the model of the last of them, and how good they turned out."""

    first: int
    predictions: int
    model: str
    accuracy: float
    brier: float


class Last(msgspec.Struct, frozen=True):
    """The champion after the last judged window, on that window, beside generation 0."""

    window: int
    champion: Scores
    generation_0: Scores


class Findings(msgspec.Struct, frozen=True):
    """What the lake says of a stream."""

    champion: str
    generations: list[str]
    trials: list[Trial]
    windows: list[Window]
    live: list[Stretch]
    served: dict[str, int]
    last: Last | None


class Figures(msgspec.Struct, frozen=True):
    """A whole run: what was asked for, what the lake says, and the audit. `share` is that of the data's rows, `measure`
    the field of `Scores` that says how well rows are told apart.
    """

    stream: str
    rows: int
    share: float
    seed: int
    measure: Measure
    seconds: float
    lake: str
    sql_example: str
    restarts: dict[str, int]
    balances: bool
    books: dict[str, int]
    findings: Findings


def measure_of(contract: Contract) -> Measure:
    """What is shown beside the Brier score."""
    if contract.output.task == "score":
        return "rank_correlation"
    two = len(contract.output.classes) == 2 and not contract.output.open and not contract.output.each
    return "auroc" if two else "accuracy"


def find(lake: Lake, stream: str) -> Findings:
    """Read the findings on a stream. Raises LakeUnavailable."""

    def rows(what: str, order: str) -> list[dict[str, Any]]:
        return lake.rows(f"select {what} where stream = ? order by {order}", [stream])

    generations = [row["model"] for row in rows("model from generations", "version")]
    runs = {row["run_id"]: row for row in rows("* from runs", '"offset"')}  # the last record of a run holds
    trials = _trials(rows("* from evaluations", '"offset"'), runs)
    served = lake.rows(
        "select model, count(*) as n from predictions where stream = ? group by all order by 1", [stream]
    )
    return Findings(
        champion=generations[-1] if generations else "none",
        generations=generations,
        trials=trials,
        windows=[msgspec.convert(row, Window) for row in rows("* from windows", '"window"')],
        live=[msgspec.convert(row, Stretch) for row in lake.rows(_LIVE, [stream])],
        served={row["model"]: row["n"] for row in served},
        last=_last(trials),
    )


def _trials(evaluations: list[dict[str, Any]], runs: Mapping[str, dict[str, Any]]) -> list[Trial]:
    by_role = {(e["run_id"], e["window"], e["role"]): e for e in evaluations}
    trials = []
    for (run_id, window, role), challenger in by_role.items():
        if role == "challenger":
            run = runs[run_id]
            trials.append(
                Trial(
                    window=window,
                    challenger=_scores(challenger),
                    champion=_scores(by_role[run_id, window, "champion"]),
                    generation_0=_scores(by_role[run_id, window, "generation-0"]),
                    windows=run["windows"],
                    rows_new=run["rows_new"],
                    rows_replayed=run["rows_replayed"],
                    e_value=challenger["e_value"],
                    verdict=challenger["verdict"],
                    coverage=challenger["coverage"],
                )
            )
    return trials


def _scores(evaluation: Mapping[str, Any]) -> Scores:
    return Scores(*(evaluation[name] for name in Scores.__struct_fields__))


def _last(trials: list[Trial]) -> Last | None:
    if not trials:
        return None
    trial = trials[-1]
    champion = trial.challenger if trial.verdict == "promote" else trial.champion
    return Last(trial.window, champion, trial.generation_0)
