"""Prepare: a fresh copy of the base becomes one that can learn: an adapter beside it, on the device, maybe in parts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from accrual.encoder import Encoder
from accrual.generator import Generator
from accrual.layers import Entering
from accrual.training_policy import Training
from trainer.adapter import adapt, take_over
from trainer.distill import Distilled, General
from trainer.learner import Learner
from trainer.shard import shard


class Prepared(NamedTuple):
    """`first`: the lowest layer that learns. `warm`: it goes on from a champion's adapter. `general`: what else it is
    asked while it learns.
    """

    first: int
    warm: bool
    general: General | None
    distill: float

    def beside(self, learner: Learner, begin: Entering) -> Learner:
        """The learner, with general text beside its rows if the contract wants that."""
        return learner if self.general is None else Distilled(learner, self.general, begin, self.distill)


def prepare(model: Encoder | Generator, rows: int, training: Training, start: Path | None, sharded: bool) -> Prepared:
    """Change `model`, which is to learn from so many rows. `start`: the folder of the champion's adapter, if it is gone
    on from. `sharded`: the ranks share the frozen layers (shard.py).

    Raises TrainingFailed as `adapt` and `take_over` do.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = adapt(model, training.lora)
    if sharded:
        shard(model.model, device)
    model.model.to(device)
    general = General(model, first, rows, sharded) if training.distill else None
    return Prepared(first, start is not None and take_over(model, start), general, training.distill)
