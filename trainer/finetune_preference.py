"""Fine-tune a generator on judgements of texts: what people liked becomes likelier, and what they did not, less likely.

Of two texts the loss is the cross-entropy of which was preferred, which is that of DPO; of one text, of whether it was
liked (accrual/reward.py has formulas and papers). How likely each text is to the base, from which the model's way is
measured, comes with the pass that computes the frozen layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from accrual import reward
from accrual.contract import Text
from accrual.errors import TrainingFailed
from accrual.generator import Generator
from accrual.layers import starting_at
from accrual.scores import indices_of
from accrual.training_policy import Training
from trainer.adapter import frozen_states
from trainer.checkpoint import checkpoint_of
from trainer.learner import Critic, counts_of, texts_of, watched_of
from trainer.loop import Loop
from trainer.precision import Precision
from trainer.prepare import prepare
from trainer.ranks import Ranks


@dataclass(frozen=True)
class TunedPreference:
    """What fine-tuning made: the model with its adapter in place, and the constant of its answers. It has no head.

    `start` and `precision`: how.
    """

    model: Generator
    classes: list[str]
    beta: float
    bias: NDArray[np.float32]
    weight: None = None
    start: Literal["base", "champion"] = "base"
    precision: Precision = "fp32"

    def logits(self, rows: Sequence[Text]) -> NDArray[np.float32]:
        """[rows, 2], not yet calibrated."""
        return reward.logits_of(self.model, rows, self.beta, self.bias).astype(np.float32)


def fine_tune_preference(
    generator: Generator,
    rows: Sequence[Text],
    labels: Sequence[str],
    classes: Sequence[str],
    training: Training,
    seed: int,
    weights: Sequence[float] | None = None,
    start: Path | None = None,
    checkpoint: Path | None = None,
    sharded: bool = False,
) -> TunedPreference:
    """Train on rows of (prompt, text) or (prompt, text, text), oldest first, and which of the two `classes` each got.

    `generator` is a fresh copy of the base; it is changed. `start`: the folder of the champion's adapter, if it is gone
    on from. All else is as `fine_tune` says. Raises TrainingFailed when the rows have fewer than two labels, weights
    are no weights, the loss is not finite or grows, or one row alone does not fit into memory.
    """
    if len(set(labels)) < 2:
        raise TrainingFailed(f"{len(labels)} rows with {len(set(labels))} label(s): nothing to tell apart")
    torch.manual_seed(seed)
    begun_at = start.parent.name if start else None
    kept = checkpoint_of(checkpoint, generator.model, rows, labels, training, seed, weights, begun_at)
    ready, device = prepare(generator, len(rows), training, start, sharded), generator.device
    texts, each = reward.written(generator, rows), len(rows[0]) - 1
    mine = texts_of(Ranks().mine(range(len(rows))), each)
    by_base = torch.zeros(len(texts), device=device)

    def forward(some: list[int]) -> None:
        with generator.model.disable_adapter():
            by_base[some] = generator.log_likelihoods([texts[text] for text in some])

    states = frozen_states(generator.model, [len(text.tokens) for text in texts], mine, ready.first, forward, sharded)
    truth = torch.from_numpy(indices_of(labels, classes)).to(device)
    counts, watched = counts_of(weights, len(rows)).to(device), watched_of(len(rows), training)
    with starting_at(generator.model, ready.first, training.gradient_checkpointing) as begin:
        critic = Critic(generator, texts, states, by_base, truth, counts, training.beta, begin, watched)
        loop = Loop(ready.beside(critic, begin), training, seed, sharded)
        loop.run(kept)
    bias = np.array([0.0, critic.bias.item()], dtype=np.float32)
    began: Literal["base", "champion"] = "champion" if ready.warm else "base"
    return TunedPreference(generator, list(classes), training.beta, bias, None, began, loop.position.precision)
