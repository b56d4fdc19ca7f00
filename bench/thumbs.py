"""Two ways to learn from thumbs, on real ratings of sentences: the trainer's, and KTO.

    python bench/thumbs.py --rows 600

Each learns from the earlier rows of examples/venue_replies.py with the contract's options, is calibrated on the next by
Platt's method, and says how likely each later row was liked. The baseline is the share of what was liked before.

The trainer's loss is the cross-entropy of "liked" by the reward and a constant (accrual/reward.py). That of KTO
(Ethayarajh et al. 2024, "KTO: model alignment as prospect theoretic optimization", arXiv:2402.01306) saturates on both
sides of a reference point, which is what the model gained on texts of other prompts; down and up weigh the same in sum.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from machine import machine

import trainer.finetune_preference
from accrual import scores
from accrual.contract import Text, load_contract
from accrual.encoder import base_folder
from accrual.generator import Generator
from accrual.scores import indices_of
from examples.venue_replies import cases
from trainer.calibrate import calibrate
from trainer.finetune_preference import TunedPreference, fine_tune_preference
from trainer.learner import Critic
from trainer.precision import Precision

CONTRACT = load_contract(Path(__file__).parents[1] / "schemas" / "contracts" / "venue-replies.yaml")


class Kto(Critic):
    """Rows are (prompt, text, text of another row); the second says where the reference point is."""

    def loss(self, rows: Sequence[int], precision: Precision) -> torch.Tensor:
        """KTO's value of the rows, below its largest."""
        ratios = self._ratios(rows, precision)
        reference = ratios[:, 1].mean().clamp(min=0).detach()
        liked, ups = self._truth[rows], self._truth.mean()
        gained = self._beta * (ratios[:, 0] - reference) * (2 * liked - 1)
        weight = torch.where(liked == 1, 0.5 / ups, 0.5 / (1 - ups))
        return (weight * (1 - torch.sigmoid(gained))).sum() + 0 * self.bias


def main() -> None:
    """Learn both ways, and print how well each foretells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600, help="replies (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=7, help="of which replies, and of the training (default: %(default)s)"
    )
    given = parser.parse_args()
    known = [case for case in cases(CONTRACT, given.rows, given.seed) if case.outcomes]
    rows = [CONTRACT.render(case.inputs) for case in known]
    labels = [CONTRACT.label_of(case.outcomes[-1][1]) for case in known]
    learn, keep = round(len(rows) * 0.5), round(len(rows) * 0.15)
    print(f"{machine()}; {learn} replies to learn from, {keep} to calibrate, {len(rows) - learn - keep} to judge")
    truth = indices_of(labels, CONTRACT.output.classes)
    share = truth[: learn + keep].mean()
    later = truth[learn + keep :]
    _say("share", np.tile([1 - share, share], (len(later), 1)), later, 0.0)
    for name in ("trainer", "kto"):
        started = time.process_time()
        tuned = _tuned(name, rows[:learn], labels[:learn], given.seed)
        spent = time.process_time() - started
        logits = tuned.logits(rows[learn:])
        calibrator = calibrate(logits[:keep], truth[learn : learn + keep], "platt")
        _say(name, calibrator.probabilities(logits[keep:]), later, spent)


def _tuned(name: str, rows: Sequence[Text], labels: Sequence[str], seed: int) -> TunedPreference:
    generator = Generator.load(base_folder("smollm2"), CONTRACT.training.max_tokens, CONTRACT.output.max_new_tokens)
    classes = CONTRACT.output.classes
    if name == "trainer":
        return fine_tune_preference(generator, rows, labels, classes, CONTRACT.training, seed)
    beside = [(row[0], row[1], other[1]) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    trainer.finetune_preference.Critic = Kto  # type: ignore[misc]
    return fine_tune_preference(generator, beside, labels, classes, CONTRACT.training, seed)


def _say(name: str, said: np.ndarray, later: np.ndarray, spent: float) -> None:
    ranks = scores.auroc(said[:, 1], later == 1)
    print(
        f"{name:8} Brier {scores.brier(said, later):.4f}  log-loss {scores.log_loss(said, later):.4f}"
        f"  AUROC {ranks:.3f}  {spent:.0f} CPU s to train",
        flush=True,
    )


if __name__ == "__main__":
    main()
