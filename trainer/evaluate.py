"""Evaluate: one frozen model on one sealed window, some rows at a time; only figures and the id of each are kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from accrual.bundle import ids_learned_from
from accrual.config import Config
from accrual.contract import Contract
from accrual.contract_change import breaking_changes
from accrual.errors import ContractError
from accrual.judged import Judged, together
from accrual.lake import open_lake
from accrual.ledger import Evaluation, SliceScores
from accrual.predictor import Predictor
from trainer.gate import LARGEST_LOSS, Verdict
from trainer.select import LAKE_MEMORY, Window, rows_of
from trainer.weigh import Row

ROWS_AT_ONCE = 10_000
MOST_SLICES = 100  # a field of many values by mistake must not make an entry that no broker takes


class Scored(msgspec.Struct, frozen=True):
    """What a model said of a window's rows, beside what was true; figures and the gate's evidence follow from it.

    By row, oldest first: `ids`, `judged`, `combination`, the place among `combinations` of the names (`grade=C`) of all
    slices that the row is in, and `counts`, how much it counts by `training.control`, 1 at most.
    """

    model: str
    window: Window
    ids: pa.ChunkedArray
    judged: Judged
    combinations: list[tuple[str, ...]]
    combination: NDArray[np.int32]
    counts: NDArray[np.float64]

    def rows_by_slice(self) -> dict[str, NDArray[np.int64]]:
        """The places of each slice's rows, in order, by the slice's name."""
        ends = np.cumsum(np.bincount(self.combination, minlength=len(self.combinations)))[:-1]
        rows = np.split(np.argsort(self.combination, kind="stable"), ends)  # of each combination
        found: dict[str, list[NDArray[np.int64]]] = {}
        for names, of_names in zip(self.combinations, rows, strict=False):  # one empty part where there are none
            for name in names:
                found.setdefault(name, []).append(of_names)
        return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}

    def entry(
        self,
        run_id: str,
        role: Literal["challenger", "champion", "generation-0"],
        at: datetime,
        verdict: Verdict | None = None,
    ) -> Evaluation:
        """The ledger's record of it; with the gate's verdict, of a challenger."""
        found = self.judged
        return Evaluation(
            stream=self.window.stream,
            run_id=run_id,
            window=self.window.window,
            model=self.model,
            role=role,
            rows=len(self.ids),
            accuracy=found.accuracy,
            auroc=found.auroc,
            brier=float(found.brier.mean()),
            log_loss=float(found.log_loss.mean()),
            ece=found.ece,
            coverage=self.window.coverage,
            calibration_error=found.calibration_error,
            rank_correlation=found.rank_correlation,
            outside=int(found.outside.sum()),
            intervals=found.intervals,
            reliability=found.reliability,
            slices=self._slice_scores(verdict.loss_at_most if verdict else {}),
            at=at,
            e_value=verdict.e_value if verdict else None,
            verdict=verdict.verdict if verdict else None,
        )

    def _slice_scores(self, loss_at_most: Mapping[str, float]) -> list[SliceScores]:
        """Of the `MOST_SLICES` slices with the most rows, by name."""
        rows, found = self.rows_by_slice(), []
        for name in sorted(sorted(rows, key=lambda name: -len(rows[name]))[:MOST_SLICES]):
            inside = rows[name]
            accuracy, brier = self.judged.hits[inside].mean(), self.judged.brier[inside].mean()
            found.append(SliceScores(name, len(inside), float(accuracy), float(brier), loss_at_most.get(name)))
        return found


def check_contract(model: str, then: Contract, contract: Contract) -> None:
    """Raises ContractError when today's contract has changed so much since a model was made that what the model says
    of rows cannot be compared any more.
    """
    found = breaking_changes(then, contract)
    if contract.output.task == "text":  # judged by tokens
        if then.training.base_model != contract.training.base_model:
            found.append("training.base_model: another base has other tokens; begin a new stream")
        if then.output.max_new_tokens != contract.output.max_new_tokens:
            found.append("output.max_new_tokens: texts would be judged up to another length; begin a new stream")
    if found:
        raise ContractError(f"{model} is of another contract: {'; '.join(found)}")


def score(predictor: Predictor, window: Window, rows: Iterable[Row], beside: Sequence[str] = ()) -> Scored:
    """Let a frozen model predict a window's rows, `ROWS_AT_ONCE` at a time.

    `rows` are as the model reads them. `beside`: the classes of models that it is compared with (`Predictor.judge`).
    """
    ids: list[pa.Array] = []
    parts: list[Judged] = []
    places: dict[tuple[str, ...], int] = {}
    combination: list[NDArray[np.int32]] = []
    weights: list[NDArray[np.float64]] = []
    for some in _batched(rows):
        ids.append(pa.array([row.prediction_id for row in some], pa.string()))
        parts.append(predictor.judge([row.text for row in some], [row.label for row in some], beside))
        combination.append(np.array([places.setdefault(row.slices, len(places)) for row in some], dtype=np.int32))
        weights.append(np.array([row.weight for row in some], dtype=np.float64))
    counts = np.concatenate(weights)
    return Scored(
        predictor.model,
        window,
        pa.chunked_array(ids),
        together(parts),
        list(places),
        np.concatenate(combination),
        counts / counts.max(initial=1e-9),
    )


def score_window(
    config: Config, contract: Contract, predictor: Predictor, window: Window, beside: Sequence[str] = ()
) -> Scored:
    """`score` on a window's rows as they were when it was sealed. `contract` is today's. Raises LakeUnavailable."""
    with open_lake(config, at_snapshot=window.snapshot_id, memory=LAKE_MEMORY) as lake:
        return score(predictor, window, rows_of(lake, contract, window, read_by=predictor.contract), beside)


def gains_of(ours: Sequence[Scored], theirs: Sequence[Scored]) -> list[NDArray[np.float64]]:
    """For each window the rows' Brier scores of `theirs` less those of `ours`: the evidence of the gate."""
    return [their.judged.brier - our.judged.brier for our, their in zip(ours, theirs, strict=True)]


def losses_of(ours: Sequence[Scored], theirs: Sequence[Scored]) -> list[float]:
    """For each window the most that any of its rows can lose, `-gains_of` (`most_lost`)."""
    return [most_lost(our.judged, their.judged) for our, their in zip(ours, theirs, strict=True)]


def most_lost(ours: Judged, theirs: Judged) -> float:
    """By how much the Brier score of ours can be above that of theirs on any row, by what both said of it and whatever
    is true.

    Where a row is one question of two answers, p of ours and q of theirs give 2 (p - y)^2 - 2 (q - y)^2, which is
    greatest at y = 0 or y = 1. Elsewhere the loss that is possible for any two forecasts.
    """
    if not (ours.binary and theirs.binary and len(ours.said)):
        return LARGEST_LOSS
    p, q = ours.said, theirs.said
    return float(2 * (np.abs(p - q) * np.where(p > q, p + q, 2 - p - q)).max())


def by_slice(parts: Sequence[Scored], gains: Sequence[NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The gains of each slice's rows, over all windows, by name."""
    found: dict[str, list[NDArray[np.float64]]] = {}
    for part, of_part in zip(parts, gains, strict=True):
        for name, rows in part.rows_by_slice().items():
            found.setdefault(name, []).append(of_part[rows])
    return {name: np.concatenate(found[name]) for name in sorted(found)}


def calibration_error_of(parts: Sequence[Scored]) -> float:
    """Calibration error of one model over several windows together, without what chance adds to it."""
    return together([part.judged for part in parts]).calibration_error


def learned_from(store: Path, bundle: str, parts: Sequence[Scored]) -> list[str]:
    """The ids among the judged rows that a model learned from, in order: there must be none."""
    taught = pa.array(ids_learned_from(store, bundle), pa.string())
    return sorted(one for part in parts for one in part.ids.filter(pc.is_in(part.ids, taught)).to_pylist())


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of `ROWS_AT_ONCE`; one that is empty if there are none."""
    coming = iter(rows)
    yield list(islice(coming, ROWS_AT_ONCE))
    while some := list(islice(coming, ROWS_AT_ONCE)):
        yield some
