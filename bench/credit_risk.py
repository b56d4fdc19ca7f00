"""What the demo published, beside the constant and the naive choice, on every row of all later windows.

    accrual demo --stream credit-risk --rows 42535 --minutes 16
    export ACCRUAL_CONFIG=.accrual/demo/accrual.toml
    python bench/credit_risk.py            each published generation, on all windows after those it learned from
    python bench/credit_risk.py --naive    and the naive choice, which is trained for that, where that can be judged

The constant is generation 0, which says the contract's prior of every loan. The naive choice learns, on the day on
which the first published generation was trained, from whatever labels had come (`training.cohort: observed`); all else
is the same. It has seen young loans, so it is judged on the windows that begin after the last of these. Labels are
mature: what became of a loan within the horizon. A gain is the constant's loss less the model's, with the 95% interval
of that paired difference over rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
from machine import machine
from numpy.typing import NDArray

from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.encoder import Encoder, base_folder
from accrual.judged import Judged, judged, together
from accrual.lake import Lake, open_lake
from accrual.predictor import Predictor
from accrual.scores import indices_of, interval_of_mean
from trainer.calibrate import calibrate
from trainer.finetune import fine_tune
from trainer.generations import Candidate, candidates, champions
from trainer.select import Window, rows_of, sealed_windows, select
from trainer.weigh import Row

Judge = Callable[[Sequence[str], Sequence[str]], Judged]
STREAM = "credit-risk"


def main() -> None:
    """Read the lake, let each model say what it thinks of the windows that it did not learn from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--naive", action="store_true", help="train the naive choice too")
    given, config, started = parser.parse_args(), load_config(), time.time()
    contract = load_contracts(Path(config.contracts))[STREAM]
    with open_lake(config) as lake:
        published, windows = champions(candidates(lake, STREAM)), sealed_windows(lake, STREAM)
    constant, *others = ((model, _load(config, model)) for model in published)
    print(
        "| windows | rows | model | said | was | Brier | gain | log-loss | gain | ECE | calibration error | AUROC |\n"
        "|---|---:|---|---:|---:|---:|---|---:|---|---:|---:|---:|"
    )
    for model, judge in others:
        _compare(config, contract, _after(windows, model), {constant[0].model: constant[1], model.model: judge})
    if given.naive and others:
        first, judge = others[0]
        judges = {constant[0].model: constant[1], first.model: judge}
        taught = [window for window in windows if first.run and window.window in first.run.windows]
        with open_lake(config, at_snapshot=taught[-1].snapshot_id) as lake:
            until, judges["naive"] = _naive(lake, contract, taught)
        _compare(config, contract, [window for window in windows if window.from_time >= until], judges)
    print(f"\n{time.time() - started:.0f} s; {machine()}")


def _compare(config: Config, contract: Contract, windows: Sequence[Window], judges: dict[str, Judge]) -> None:
    """A line for each model; the first is the one that gains are measured against."""
    rows: list[list[Row]] = []
    for window in windows:
        with open_lake(config, at_snapshot=window.snapshot_id) as lake:
            rows.append(rows_of(lake, contract, [window]))
    found = {
        name: together([judge([row.text for row in some], [row.label for row in some]) for some in rows])
        for name, judge in judges.items()
    }
    against = next(iter(found.values()))
    for name, of in found.items():
        auroc = "" if of.auroc is None else f"{of.auroc:.3f}"
        print(
            f"| {windows[0].window} to {windows[-1].window} | {len(of.brier):,} | {name} | {of.said.mean():.4f}"
            f" | {of.happened.mean():.4f} | {of.brier.mean():.4f} | {_gain(against.brier - of.brier)}"
            f" | {of.log_loss.mean():.4f} | {_gain(against.log_loss - of.log_loss)} | {of.ece:.4f}"
            f" | {of.calibration_error:.4f} | {auroc} |",
            flush=True,
        )


def _gain(paired: NDArray[np.float64]) -> str:
    low, high = interval_of_mean(paired)
    return f"{paired.mean():+.5f} ({low:+.5f} to {high:+.5f})" if paired.any() else ""


def _load(config: Config, model: Candidate) -> Judge:
    return Predictor.load(config.model_store / (model.bundle or ""), config).judge


def _after(windows: Sequence[Window], model: Candidate) -> list[Window]:
    """The windows that begin after the last row that a model learned from."""
    until = model.run.learned_until if model.run else None
    return [window for window in windows if until is not None and window.from_time >= until]


def _naive(lake: Lake, contract: Contract, taught: Sequence[Window]) -> tuple[datetime, Judge]:
    """The naive choice on the day when these windows were the sealed ones: until when it has seen loans, and itself."""
    training = msgspec.structs.replace(contract.training, cohort="observed")
    selection = select(lake, msgspec.structs.replace(contract, training=training), taught, training.seed)
    learn, late, classes = selection.learn, selection.calibrate, contract.output.classes
    tuned = fine_tune(
        Encoder.load(base_folder("minilm"), training.max_tokens),
        [row.text for row in learn],
        [row.label for row in learn],
        classes,
        training,
        training.seed,
    )
    fitted = calibrate(
        tuned.logits([row.text for row in late]),
        indices_of([row.label for row in late], tuned.classes),
        training.calibration,
    )

    def judge(texts: Sequence[str], labels: Sequence[str]) -> Judged:
        return judged(fitted.probabilities(tuned.logits(texts)), indices_of(labels, tuned.classes))

    bad = sum(row.label == classes[1] for row in learn) / len(learn)
    print(f"\nThe naive choice learned from {len(learn):,} rows, {bad:.1%} of them charged off.\n", flush=True)
    return selection.until, judge


if __name__ == "__main__":
    main()
