"""What calibration and retention do on real data: the two data sets of the demo, with the contracts that ship.

python bench/judging.py calibration         each method, fitted on few rows, on the rows that follow
python bench/judging.py retention           what an adapter at each scale loses of the base, and of the task
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Literal

from accrual import scores
from accrual.calibrator import Method
from accrual.contract import CENSORED, Contract, load_contract
from accrual.encoder import Encoder, base_folder
from examples import credit_risk, support_intents
from trainer.calibrate import calibrate
from trainer.finetune import Tuned, fine_tune
from trainer.retention import SCALES, cosines, read_probe, retained, scale_adapter

CONTRACTS = Path(__file__).parents[1] / "schemas" / "contracts"
LEARN, KEPT_BACK, AFTER = 1000, 500, 1000  # rows, in this order
METHODS: tuple[Literal["auto"] | Method, ...] = ("none", "temperature", "platt", "beta", "isotonic", "auto")
FIGURES = (scores.brier, scores.log_loss, scores.accuracy, scores.ece, scores.calibration_error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["calibration", "retention"])
    (_calibration if parser.parse_args().what == "calibration" else _retention)()


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
    tuned = _tuned(contract, texts, labels)
    probe = read_probe("stsb")
    base = cosines(Encoder.load(base_folder("minilm"), contract.training.max_tokens), probe)
    truth = scores.indices_of(labels[LEARN:], tuned.classes)
    print("adapter scale | change of correlation on stsb | at least | Brier | accuracy")
    for scale in (*SCALES, 0.0):
        scale_adapter(tuned.encoder, scale)
        change, low = retained(probe, base, cosines(tuned.encoder, probe))
        logits = tuned.logits(texts[LEARN:])
        said = calibrate(logits[:KEPT_BACK], truth[:KEPT_BACK]).probabilities(logits[KEPT_BACK:])
        brier, accuracy = scores.brier(said, truth[KEPT_BACK:]), scores.accuracy(said, truth[KEPT_BACK:])
        print(f"{scale:g} | {change:+.4f} | {low:+.4f} | {brier:.4f} | {accuracy:.3f}")


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
