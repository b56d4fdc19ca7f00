"""What a model that learned from the first loans is worth on all later ones, and how many of these its proof takes.

    python bench/credit_risk.py --logits logits.npz

Real loans with their real dates (examples/credit_risk.py), in order of issue, each with what became of it within the
horizon. The model is made as the trainer makes a first challenger, from the contract: fine-tuned on the first 88% of
10,000 loans, calibrated on the others of these; then it never changes.

The naive choice is the same training on the day when the last of the 10,000 loans is as old as the horizon, from what
had happened by then: all loans that had been paid or charged off, and no others. Both are judged on the loans issued
after that day, which neither can have seen. The logits, half an hour of computing, go to the file, or are taken from
there.

The constant is generation 0, which says the contract's prior of every loan; the learned constant says the share in the
10,000. A gain is the constant's loss less the model's, with the 95% interval of that paired difference over rows.
`calibration error` is the debiased one; `within grades` is the mean distance, over rows, from what was said of the
loans of a grade to what happened to them (calibration in parts, as Hébert-Johnson et al. 2018, "Multicalibration",
ICML, ask for it).

The second table recalibrates the model on the latest rows wherever in the data one may be, as every cycle does, and
says how far from the next ones it is, beside constants that are as old as these rows, or as all before.

The third table says how many rows the gate takes, in quartiles, if it begins to judge at any of the next 20,000 rows:
with stakes that hold for any loss, and with those that what both models said allows.
"""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray

from accrual import scores
from accrual.contract import Contract, load_contract
from accrual.encoder import Encoder, base_folder
from examples.case import Case
from examples.credit_risk import ROWS, cases
from trainer.calibrate import calibrate
from trainer.finetune import fine_tune
from trainer.gate import LARGEST_LOSS, STAKES, spent_alpha, stake_of
from trainer.pool import KEPT_BACK

Floats = NDArray[np.floating[Any]]
CONTRACT = Path(__file__).parents[1] / "schemas" / "contracts" / "credit-risk.yaml"
SEED = 7
LEARN = 10_000
CHOSEN_BY = 20_000  # what comes after this row had no part in the choice of the contract's options
WINDOW, BEGINNINGS = 1000, 20
KEPT, NEXT = 1200, 2000  # loans: to calibrate on, and judged


def main() -> None:
    """Learn, say, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, required=True, metavar="FILE", help="of all loans not learned from")
    file, contract = parser.parse_args().logits, load_contract(CONTRACT)
    loans, horizon = list(cases(contract, ROWS, SEED)), timedelta(microseconds=contract.horizon_us)
    texts = [contract.render(loan.inputs) for loan in loans]
    grades = [str(loan.inputs["grade"]) for loan in loans]
    labels = [label_by(contract, loan, loan.predicted_at + horizon) or contract.on_expiry for loan in loans]
    truth = scores.indices_of(labels, contract.output.classes)

    ripe = loans[LEARN - 1].predicted_at + horizon  # the day on which what is learned is known
    after = sum(loan.predicted_at < ripe for loan in loans)
    happened = [label_by(contract, loan, ripe) for loan in loans]
    come = [n for n, label in enumerate(happened) if label is not None]
    learned, naively = int(LEARN * (1 - KEPT_BACK)), int(len(come) * (1 - KEPT_BACK))
    if not file.exists():
        mature = _logits(contract, texts[:learned], labels[:learned], texts[learned:])
        named = [texts[n] for n in come], [happened[n] or "" for n in come]
        naive = _logits(contract, named[0][:naively], named[1][:naively], named[0][naively:] + texts[after:])
        np.savez(file, mature=mature, naive=naive)
    logits = np.load(file)
    model = _calibrated(contract, logits["mature"], truth[learned:LEARN])
    late = scores.indices_of([happened[n] or "" for n in come[naively:]], contract.output.classes)
    naive = _calibrated(contract, logits["naive"], late)
    print(
        f"Issued after {ripe:%Y-%m-%d}: loan {after + 1:,} on. By then {len(come):,} had been paid or charged off"
        f" ({np.mean([happened[n] == 'charged_off' for n in come]):.1%} of them charged off).\n\n"
        "| loans | model | said | was | Brier | gain | log-loss | gain"
        " | ECE | calibration error | within grades | AUROC |\n"
        "|---|---|---:|---:|---:|---|---:|---|---:|---:|---:|---:|"
    )
    for begin, end in ((LEARN, CHOSEN_BY), (CHOSEN_BY, len(truth)), (LEARN, len(truth)), (after, len(truth))):
        said = {
            "constant": _always(contract, (contract.output.prior or {})["charged_off"], end - begin),
            "learned constant": _always(contract, (truth[:LEARN] == 1).mean(), end - begin),
            "model": model[begin - LEARN : end - LEARN],
        }
        if begin == after:
            said["naive choice"] = naive
        for name, probabilities in said.items():
            line = f"{begin + 1:,} to {end:,} | {name}"
            print_row(line, probabilities, said["constant"], truth[begin:end], grades[begin:end])
    print_calibration(contract, logits["mature"], truth, learned)
    print_rows_needed(model, _always(contract, (contract.output.prior or {})["charged_off"], len(model)), truth[LEARN:])
    print(f"\n{machine()}")


def print_row(name: str, said: Floats, constant: Floats, truth: NDArray[np.int64], grades: list[str]) -> None:
    """A line of the first table."""
    brier = scores.brier_per_row(said, truth), scores.brier_per_row(constant, truth)
    loss = scores.log_loss_per_row(said, truth), scores.log_loss_per_row(constant, truth)
    auroc = scores.auroc(said[:, 1], truth == 1) or 0.5
    print(
        f"| {name} | {said[:, 1].mean():.4f} | {(truth == 1).mean():.4f} | {brier[0].mean():.4f} | {gain(*brier)}"
        f" | {loss[0].mean():.4f} | {gain(*loss)} | {scores.ece(said, truth):.4f}"
        f" | {scores.calibration_error(said, truth):.4f} | {within(grades, said, truth):.4f} | {auroc:.3f} |"
    )


def gain(ours: Floats, theirs: Floats) -> str:
    """By how much `ours` is lower, and the interval; nothing where they are the same."""
    paired = np.asarray(theirs - ours, dtype=np.float64)
    low, high = scores.interval_of_mean(paired)
    return f"{paired.mean():+.4f} ({low:+.4f} to {high:+.4f})" if paired.any() else ""


def within(groups: list[str], said: Floats, truth: NDArray[np.int64]) -> float:
    """How far what was said of a group is from what happened to it, over all rows."""
    number = np.unique(groups, return_inverse=True)[1]
    return float(np.abs(np.bincount(number, weights=said[:, 1] - (truth == 1))).sum() / len(number))


def print_calibration(contract: Contract, logits: Floats, truth: NDArray[np.int64], learned: int) -> None:
    """The second table: calibrated on KEPT rows, judged on the NEXT ones, in the mean over all places to begin."""
    found: dict[str, list[tuple[float, float]]] = {}
    beginnings = range(learned + KEPT, len(truth) - NEXT + 1, WINDOW)
    for now in beginnings:
        latest, after = slice(now - KEPT, now), slice(now, now + NEXT)
        calibrator = calibrate(logits[now - KEPT - learned : now - learned], truth[latest], "temperature")
        forecasts = {
            "constant": _always(contract, (contract.output.prior or {})["charged_off"], NEXT),
            "constant of all rows before": _always(contract, (truth[:now] == 1).mean(), NEXT),
            "constant of the latest rows": _always(contract, (truth[latest] == 1).mean(), NEXT),
            "model": calibrator.probabilities(logits[now - learned : now + NEXT - learned]),
        }
        for name, said in forecasts.items():
            off = abs(float(said[:, 1].mean() - (truth[after] == 1).mean()))
            found.setdefault(name, []).append((off, scores.calibration_error(said, truth[after])))
    print(
        f"\nCalibrated on {KEPT:,} loans, judged on the next {NEXT:,}; the mean of {len(beginnings)} beginnings.\n\n"
        "| | said less was | calibration error |\n|---|---:|---:|"
    )
    for name, of in found.items():
        off, error = np.mean(of, axis=0)
        print(f"| {name} | {off:.4f} | {error:.4f} |")


def print_rows_needed(said: Floats, constant: Floats, truth: NDArray[np.int64]) -> None:
    """The third table: each window's stakes are those that its rows allow, as in trainer/evaluate.py."""
    p, q = said[:, 1], constant[:, 1]
    gains = scores.brier_per_row(constant, truth) - scores.brier_per_row(said, truth)
    losses = 2 * np.abs(p - q) * np.where(p > q, p + q, 2 - p - q)
    rows = len(gains) // WINDOW * WINDOW
    most = np.repeat(losses[:rows].reshape(-1, WINDOW).max(axis=1), WINDOW)
    print(
        f"\nA row's gain {gains.mean():.4f}, spread {gains.std():.4f}; most that one can lose {losses.max():.3f}.\n\n"
        "| challenger | evidence | rows, any loss | rows, by what was said |\n|---|---:|---|---|"
    )
    for nth in (1, 2, 3):
        needed = 1 / spent_alpha(0.05, nth)
        cells = [quartiles(needed, gains[:rows], of) for of in (np.full(rows, LARGEST_LOSS), most)]
        print(f"| {nth} | {needed:.0f} | {cells[0]} | {cells[1]} |")


def quartiles(needed: float, gains: Floats, most: Floats) -> str:
    """Rows until the wealth reaches that: median, and where half of the beginnings lie."""
    found = []
    for begin in range(0, BEGINNINGS * WINDOW, WINDOW):
        ends = [np.cumsum(np.log1p(stake_of(share, most[begin:]) * gains[begin:])) for share in STAKES]
        reached = np.flatnonzero(np.exp(ends).mean(axis=0) >= needed)
        found.append(float(reached[0]) + 1 if len(reached) else np.inf)
    low, median, high = np.quantile(found, [0.25, 0.5, 0.75])
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def label_by(contract: Contract, loan: Case, moment: datetime) -> str | None:
    """What had become of a loan by that moment, if anything had."""
    known = [values for at, values in loan.outcomes if at <= moment]
    return contract.label_of(known[-1]) if known else None


def _logits(contract: Contract, learn: list[str], labels: list[str], ask: list[str]) -> Floats:
    """Of the rows asked about, [rows, classes], by a model that learned from the others."""
    training = contract.training
    encoder = Encoder.load(base_folder("minilm"), training.max_tokens)
    return fine_tune(encoder, learn, labels, contract.output.classes, training, training.seed).logits(ask)


def _calibrated(contract: Contract, logits: Floats, kept_back: NDArray[np.int64]) -> Floats:
    """Probabilities of the rows that follow those kept back, calibrated on these."""
    calibrator = calibrate(logits[: len(kept_back)], kept_back, contract.training.calibration)
    print(f"Calibrated by {calibrator.method}, temperature {calibrator.temperature}, on {len(kept_back):,} loans.")
    return calibrator.probabilities(logits[len(kept_back) :])


def _always(contract: Contract, charged_off: float, rows: int) -> Floats:
    """The same of every loan."""
    return np.tile(
        [charged_off if name == "charged_off" else 1 - charged_off for name in contract.output.classes], (rows, 1)
    )


if __name__ == "__main__":
    main()
