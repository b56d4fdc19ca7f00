"""Backtest: what the trainer would have made of a lake's windows, had it seen them sealed one after another.

The steps are those of `trainer/cycle.py`, on the lake as it was before each next window was sealed; what it makes and
says stays in a folder of its own, and nothing is published. Time is event time: a window is sealed when the horizon of
its last prediction has passed. A training takes none of it, so a challenger of window n is judged from n + 1 on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np

from accrual.bundle import read_classes
from accrual.config import Config, Mlflow
from accrual.contract import Contract
from accrual.errors import ConfigError, NotFound
from accrual.lake import open_lake
from accrual.ledger import Generation
from accrual.scores import interval_of_mean
from trainer.cycle import Past, Trainer
from trainer.evaluate import Scored, calibration_error_of, gains_of, score_window
from trainer.generations import Candidate, bundle_of, candidate, candidates_of, champions, predictor_of
from trainer.publish import Said
from trainer.select import LAKE_MEMORY, Window, sealed_windows

log = logging.getLogger(__name__)


class Afterwards(msgspec.Struct, frozen=True):
    """A published model on the windows after those that judged it, which say whether it was right to publish it.

    `gain`: by how much its Brier score a row was below that of the champion it replaced, with the 95% interval.
    `calibration_error`: of all these rows together, debiased (accrual/scores.py); its own and the other's.
    """

    model: str
    replaced: str
    windows: list[int]
    rows: int
    gain: float
    low: float
    high: float
    calibration_error: float
    replaced_calibration_error: float


def apart(config: Config, folder: Path) -> Config:
    """The same lake and settings, with models, keys and checkpoints in `folder`. Raises ConfigError if it is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is no empty folder: name one that is new, or remove this one")
    lake = msgspec.structs.replace(config.lake, catalog=config.lake_catalog, data=config.lake_data)
    models = msgspec.structs.replace(config.models, store="", public_key="")
    alone = msgspec.structs.replace(config.trainer, shard=False)
    return msgspec.structs.replace(config, lake=lake, models=models, trainer=alone, mlflow=Mlflow(), state=str(folder))


def backtest(
    config: Config, contract: Contract, shown: Callable[[Sequence[Window]], Iterable[Window]]
) -> list[Candidate]:
    """All models that the trainer would have made. `config` is one that `apart` gave; `shown` passes the windows on.

    Raises NotFound where no window is sealed, and what `Trainer.next_step` raises.
    """
    stream, said = contract.stream, Said()
    with open_lake(config, memory=LAKE_MEMORY) as lake:
        windows = sealed_windows(lake, stream)
    if not windows:
        raise NotFound(f"no window of {stream} is sealed yet: there is no past to go through")
    if len({window.snapshot_id for window in windows}) < len(windows):
        log.warning("rows of %s were erased since: steps see all that came up to then, revisions too", stream)
    trainer = Trainer(config, {stream: contract}, said)
    published: dict[str, Generation] = {}
    for window in shown(windows):
        before = [one for one in windows if one.window <= window.window]
        later = windows[len(before) :]
        now = window.to_time + timedelta(microseconds=contract.horizon_us)
        past, moved = Past(before, later[0].snapshot_id if later else None, now), True
        while moved:
            moved = trainer.next_step(stream, past)
            if (champion := said.champion(stream)) is not None:
                published[champion.model] = champion
    runs = [run for run, _ in said.begun(stream)]
    return candidates_of(runs, [e for run in runs for e in said.evaluations(run.run_id)], published.values())


def afterwards(config: Config, contract: Contract, known: Sequence[Candidate]) -> list[Afterwards]:
    """For each published model but generation 0 that a window was sealed after."""
    found = []
    with open_lake(config, memory=LAKE_MEMORY) as lake:
        windows = sealed_windows(lake, contract.stream)
    for model in champions(known):
        later = [w for w in windows if model.trials and w.window > model.trials[-1].challenger.window]
        if model.run is None or not later:
            continue
        replaced = candidate(known, model.run.parent)
        classes = [name for one in (model, replaced) for name in read_classes(bundle_of(config, one))]
        ours, theirs = (_scored(config, contract, one, later, classes) for one in (model, replaced))
        if not ours:
            continue
        gains = np.concatenate(gains_of(ours, theirs))
        low, high = interval_of_mean(gains)
        found.append(
            Afterwards(
                model=model.model,
                replaced=replaced.model,
                windows=[one.window.window for one in ours],
                rows=len(gains),
                gain=float(gains.mean()),
                low=low,
                high=high,
                calibration_error=calibration_error_of(ours),
                replaced_calibration_error=calibration_error_of(theirs),
            )
        )
    return found


def _scored(
    config: Config, contract: Contract, model: Candidate, windows: Sequence[Window], beside: Sequence[str]
) -> list[Scored]:
    """On the windows of which a row is left."""
    predictor = predictor_of(config, model)
    scored = (score_window(config, contract, predictor, window, beside) for window in windows)
    return [one for one in scored if len(one.ids)]
