"""Fine-tune a generator on completions: the same loop as for classes (`finetune.py`), with nothing but an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from accrual.errors import TrainingFailed
from accrual.generator import Generator
from accrual.layers import starting_at
from accrual.training_policy import Training
from trainer.adapter import frozen_states
from trainer.checkpoint import checkpoint_of
from trainer.learner import Writer, counts_of, watched_of
from trainer.loop import Loop
from trainer.precision import Precision, of_frozen
from trainer.prepare import prepare
from trainer.ranks import Ranks


@dataclass(frozen=True)
class TunedText:
    """What fine-tuning made: the model with its adapter in place. `start` and `precision`: how."""

    model: Generator
    start: Literal["base", "champion"] = "base"
    precision: Precision = "fp32"


def fine_tune_text(
    generator: Generator,
    prompts: Sequence[str],
    completions: Sequence[str],
    training: Training,
    seed: int,
    weights: Sequence[float] | None = None,
    start: Path | None = None,
    checkpoint: Path | None = None,
    sharded: bool = False,
) -> TunedText:
    """Train on rows of prompt and completion, oldest first; only the completions' tokens are learned.

    `generator` is a fresh copy of the base; it is changed. `start`: the folder of the champion's adapter, if it is gone
    on from. All else is as `fine_tune` says. Raises TrainingFailed when there is no row, weights are no weights, the
    loss is not finite or grows, or one row alone does not fit into memory.
    """
    if not prompts:
        raise TrainingFailed("no row to learn from")
    torch.manual_seed(seed)
    begun_at = start.parent.name if start else None
    kept = checkpoint_of(checkpoint, generator.model, prompts, completions, training, seed, weights, begun_at)
    ready = prepare(generator, len(prompts), training, start, sharded)
    rows = generator.written(prompts, completions)
    mine, lengths = Ranks().mine(range(len(rows))), [len(row.tokens) for row in rows]

    def forward(some: list[int]) -> None:
        generator.states_before([rows[row] for row in some])

    precision = of_frozen(training.precision)
    states = frozen_states(generator.model, lengths, mine, ready.first, forward, sharded, precision)
    counts, watched = counts_of(weights, len(rows)).to(generator.device), watched_of(len(rows), training)
    with starting_at(generator.model, ready.first, training.gradient_checkpointing) as begin:
        learner = ready.beside(Writer(generator, rows, states, counts, begin, watched), begin)
        loop = Loop(learner, training, seed, sharded)
        loop.run(kept)
    return TunedText(generator, "champion" if ready.warm else "base", loop.position.precision)
