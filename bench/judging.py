"""What calibration and retention do on real data, that of the demo with its contracts; what the gate costs in rows.

python bench/judging.py calibration         each method, fitted on few rows, on the rows that follow
python bench/judging.py retention           what each lever keeps of the base, and costs of the task
"""

from __future__ import annotations

import argparse
import time
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual import scores
from accrual.calibrator import Method
from accrual.contract import CENSORED, Contract, load_contract
from accrual.encoder import Encoder, base_folder
from accrual.training_policy import Lora
from examples import credit_risk, support_intents
from trainer.calibrate import calibrate
from trainer.finetune import Tuned, fine_tune
from trainer.gate import LARGEST_LOSS, STAKES, loss_at_most, spent_alpha, stake_of
from trainer.retention import LEVERS, SCALES, Likeness, ability, levered, read_probe, retained, scale_adapter
from trainer.select import MOST_JUDGED

CONTRACTS = Path(__file__).parents[1] / "schemas" / "contracts"
NEVER = 10**9
LEARN, KEPT_BACK, AFTER = 1000, 500, 1000  # rows, in this order
METHODS: tuple[Literal["auto"] | Method, ...] = ("none", "temperature", "platt", "beta", "isotonic", "auto")
FIGURES = (scores.brier, scores.log_loss, scores.accuracy, scores.ece, scores.calibration_error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"calibration": _calibration, "retention": _retention, "gate": _gate}
    parser.add_argument("what", choices=list(parts))
    parts[parser.parse_args().what]()


def _calibration() -> None:
    print("stream | calibrated on | method | Brier | log-loss | accuracy | ECE | calibration error")
    for module in (support_intents, credit_risk):
        contract, texts, labels = _rows(module)
        tuned = _tuned(contract, texts, labels)
        logits = tuned.logits(texts[LEARN:])
        truth = scores.indices_of(labels[LEARN:], tuned.classes)
        for rows in (60, 140, KEPT_BACK):
            kept_back = slice(KEPT_BACK - rows, KEPT_BACK)
            for method in METHODS:
                fitted = calibrate(logits[kept_back], truth[kept_back], method)
                said = fitted.probabilities(logits[KEPT_BACK:])
                figures = [f(said, truth[KEPT_BACK:]) for f in FIGURES]
                chosen = f"auto: {fitted.method}" if method == "auto" else method
                print(contract.stream, rows, chosen, *(f"{figure:.4f}" for figure in figures), sep=" | ", flush=True)


def _retention() -> None:
    contract, texts, labels = _rows(support_intents)
    probe = read_probe("stsb", "classification")
    assert isinstance(probe, Likeness)
    base = ability(Encoder.load(base_folder("minilm"), contract.training.max_tokens), probe)
    hard = msgspec.structs.replace(contract.training, learning_rate=0.01, lora=Lora(layers=6))
    trainings = {
        "the contract that ships": contract.training,
        "the same with distillation": levered(contract.training, ["distillation"]),
        "ten times the rate, all six layers": hard,
        "with distill: 1": msgspec.structs.replace(hard, distill=1.0),
    }
    trainings |= {f"with {lever}": levered(hard, [lever]) for lever in LEVERS}
    print("training | CPU s | adapter scale | change of correlation on stsb | at least | Brier | accuracy")
    for name, training in trainings.items():
        started = time.process_time()
        tuned = _tuned(msgspec.structs.replace(contract, training=training), texts, labels)
        seconds = time.process_time() - started
        truth = scores.indices_of(labels[LEARN:], tuned.classes)
        for scale in (*SCALES, 0.0):
            scale_adapter(tuned.model, scale)
            change, low = retained(probe, base, ability(tuned.model, probe))
            logits = tuned.logits(texts[LEARN:])
            said = calibrate(logits[:KEPT_BACK], truth[:KEPT_BACK]).probabilities(logits[KEPT_BACK:])
            figures = scores.brier(said, truth[KEPT_BACK:]), scores.accuracy(said, truth[KEPT_BACK:])
            print(
                name,
                f"{seconds:.0f} | {scale:g} | {change:+.4f} | {low:+.4f}",
                *map("{:.4f}".format, figures),
                sep=" | ",
                flush=True,
            )


def _gate() -> None:
    chance, needed = np.random.default_rng(1), 1 / spent_alpha(0.05, 1)
    print("mean gain | spread | rows: 5% | median | 95%, of 200 simulations")
    for mean, spread, most in ((0.136, 0.4, 3_000), (0.05, 0.4, 5_000), (0.0015, 0.05, 60_000), (0.0005, 0.05, 60_000)):
        rows = [_rows_until(needed, chance.normal(mean, spread, most).clip(-2, 2)) for _ in range(200)]
        low, median, high = (
            f"{q:.0f}" if q <= most else f"more than {most}" for q in np.quantile(rows, [0.05, 0.5, 0.95])
        )
        print(mean, spread, low, median, high, sep=" | ", flush=True)
    print("rows of a slice | spread | bound on its loss, of five slices: mean of 50 simulations")
    for spread in (0.0, 0.05, 0.2):
        for rows in (100, 200, 300, 400, 800):
            bounds = [loss_at_most(chance.normal(0, spread, rows).clip(-2, 2), 0.05 / 5) for _ in range(50)]
            print(rows, spread, f"{np.mean(bounds):.3f}", sep=" | ", flush=True)
    print(f"mean gain | spread | enough evidence in {MOST_JUDGED} rows, of 100 simulations")
    for mean in (0.0005, 0.0003, 0.0002, 0.0001):
        found = [_rows_until(needed, chance.normal(mean, 0.05, MOST_JUDGED).clip(-2, 2)) for _ in range(100)]
        print(mean, 0.05, sum(rows < NEVER for rows in found), sep=" | ", flush=True)


def _rows_until(evidence: float, gains: NDArray[np.float64]) -> int:
    wealths = np.mean([np.exp(np.cumsum(np.log1p(stake_of(share, LARGEST_LOSS) * gains))) for share in STAKES], axis=0)
    reached = np.flatnonzero(wealths >= evidence)
    return int(reached[0]) + 1 if len(reached) else NEVER


def _rows(module: ModuleType) -> tuple[Contract, list[str], list[str]]:
    """Consecutive rows of a demo stream: the text that the model reads, and the label, final."""
    contract = load_contract(CONTRACTS / f"{module.__name__.rsplit('.', 1)[1].replace('_', '-')}.yaml")
    horizon = timedelta(microseconds=contract.horizon_us)
    texts, labels = [], []
    for case in module.cases(contract, LEARN + KEPT_BACK + AFTER + 100, 17):
        known = [values for at, values in case.outcomes if at <= case.predicted_at + horizon]
        if known or contract.on_expiry != CENSORED:
            texts.append(contract.render(case.inputs))
            labels.append(contract.label_of(known[-1]) if known else contract.on_expiry)
    return contract, texts[: LEARN + KEPT_BACK + AFTER], labels[: LEARN + KEPT_BACK + AFTER]


def _tuned(contract: Contract, texts: list[str], labels: list[str]) -> Tuned:
    encoder = Encoder.load(base_folder("minilm"), contract.training.max_tokens)
    return fine_tune(
        encoder, texts[:LEARN], labels[:LEARN], contract.output.classes, contract.training, contract.training.seed
    )


if __name__ == "__main__":
    main()
