"""The loop: epochs of steps over the rows, by AdamW, the learning rate falling to zero along a half cosine.

What happens at a step depends on the rows, the contract, the seed and the position alone. So a loop that goes on from a
checkpoint ends with the weights of one that was never stopped, bit by bit on the same machine.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from accrual.encoder import batches
from accrual.errors import TrainingFailed
from accrual.training_policy import Training
from trainer.checkpoint import Checkpoint
from trainer.learner import Learner
from trainer.memory import Budget
from trainer.precision import Precision, choose
from trainer.ranks import Ranks

log = logging.getLogger(__name__)

RECENT = 10  # steps over which the loss is averaged: one odd batch is no spike
SPIKE = 2.0  # times what it was at the start, or what guessing costs


class Position(msgspec.Struct):
    """Where the loop stands: the next step of an epoch, and all it knows besides tensors.

    `budget` in tokens. `total` is the epoch's loss so far. `first` and `recent` are losses of steps. `best` and
    `waited`: the lowest loss on the watched rows, and the epochs since.
    """

    precision: Precision
    budget: int
    epoch: int = 0
    step: int = 0
    total: float = 0.0
    first: float | None = None
    recent: list[float] = []
    best: float | None = None
    waited: int = 0


class Loop:
    """One training, which changes the learner's weights in place; `in_step` with other ranks if the base is sharded."""

    def __init__(self, learner: Learner, training: Training, seed: int, in_step: bool = False) -> None:
        self._learner = learner
        self._training = training
        self._seed = seed
        self._in_step = in_step
        self._ranks = Ranks()
        self._lengths = learner.lengths
        self._trained = learner.parameters
        self._optimizer = torch.optim.AdamW(self._trained, lr=training.learning_rate, weight_decay=0.01)
        self._best: list[torch.Tensor] = []
        self._budget = Budget(in_step=in_step)
        self.position = Position(precision="fp32", budget=self._budget.tokens)

    def run(self, checkpoint: Checkpoint | None) -> None:
        """Train to the end, from the checkpoint if there is one.

        Raises TrainingFailed when the loss is not finite or grows, or one row does not fit into memory.
        """
        if checkpoint is None or not self._resume(checkpoint):
            first = self._steps_of(0)[0][0]
            self.position.precision = choose(
                self._training.precision, self._learner.device, lambda: self._part_of(first, len(first))[0]
            )
        at = self.position
        while at.epoch < self._training.epochs:
            steps = self._steps_of(at.epoch)
            with self._progress() as shown:
                bar = shown.add_task(f"epoch {at.epoch + 1} of {self._training.epochs}", total=len(steps))
                while at.step < len(steps):
                    self._step(steps[at.step], (at.epoch * len(steps) + at.step) / (self._training.epochs * len(steps)))
                    at.step += 1
                    shown.update(bar, completed=at.step)
                    if checkpoint is not None and at.step % self._training.checkpoint_steps == 0:
                        self._save(checkpoint)
            log.info("epoch %d of %d: loss %.4f", at.epoch + 1, self._training.epochs, at.total / self._learned)
            at.epoch, at.step, at.total = at.epoch + 1, 0, 0.0
            if self._learner.watched:
                self._watch()
            if checkpoint is not None:
                self._save(checkpoint)
        for parameter, best in zip(self._trained, self._best, strict=False):
            parameter.data.copy_(best)
        broken = torch.zeros(1, device=self._learner.device)
        for parameter in self._trained:
            broken += (~torch.isfinite(parameter)).sum()
        self._ranks.add_up([broken])  # each may hold a part of the weights
        if broken.item():
            raise TrainingFailed("the last step made weights that are no numbers: lower training.learning_rate")

    def _progress(self) -> Progress:
        """A bar for whoever watches: on a terminal, of one process."""
        console = Console(stderr=True)
        return Progress(console=console, transient=True, disable=not console.is_terminal or self._ranks.rank > 0)

    @property
    def _learned(self) -> int:
        return len(self._lengths) - self._learner.watched

    def _steps_of(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's steps, each of `training.accumulate` batches of rows: every row once, in an order of its own."""
        chance = np.random.default_rng([self._seed, epoch])
        mixed = chance.permutation(self._learned)
        groups = [[int(mixed[i]) for i in group] for group in batches([self._lengths[row] for row in mixed])]
        order = [groups[i] for i in chance.permutation(len(groups))]
        each = self._training.accumulate
        return [order[i : i + each] for i in range(0, len(order), each)]

    def _step(self, groups: Sequence[Sequence[int]], done: float) -> None:
        """One change of the weights; `done` is the share of the training that lies behind it."""
        count = sum(len(group) for group in groups)
        loss, gradients = 0.0, [torch.zeros_like(parameter) for parameter in self._trained]
        for group in groups:
            of_group, parts = self._part_of(group, count)
            loss += of_group
            for gradient, part in zip(gradients, parts, strict=True):
                gradient += part
        summed = torch.tensor([loss], dtype=torch.float32, device=self._learner.device)
        self._ranks.add_up([*gradients, summed])
        self._note(summed.item())
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        for settings in self._optimizer.param_groups:
            settings["lr"] = self._training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        self._optimizer.step()
        self.position.total += summed.item() * count

    def _part_of(self, group: Sequence[int], count: int) -> tuple[float, list[torch.Tensor]]:
        """What this rank's rows of a batch add to the loss and the gradient of a step of `count` rows."""
        loss, gradients = 0.0, [torch.zeros_like(parameter) for parameter in self._trained]

        def compute(rows: list[int], counted: bool) -> None:
            nonlocal loss
            of_rows = self._learner.loss(rows, self.position.precision) / count
            parts = torch.autograd.grad(of_rows, self._trained)
            if counted:  # into tensors of its own: when memory runs out half-way, nothing has been added
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient += part
                loss += of_rows.item()

        self._on_mine(group, compute)
        return loss, gradients

    def _on_mine(self, group: Sequence[int], work: Callable[[list[int], bool], None]) -> None:
        """Call `work` with this rank's rows of a batch, in pieces as memory has room, and that they are counted.

        A rank that has none and must keep in step does it on a row of another's, which is not counted: nor could it be,
        for this rank does not have the states that enter the layers that learn.
        """
        mine = self._ranks.mine(group)
        if mine:
            self._budget.spend(mine, self._lengths, lambda rows: work(rows, True))
        elif self._in_step:
            work([group[0]], False)

    def _note(self, loss: float) -> None:
        """Raises TrainingFailed for a loss that is no number, or has grown beyond what chance explains."""
        at = self.position
        where = f"in epoch {at.epoch + 1}, step {at.step + 1}: lower training.learning_rate or look at the rows"
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} {where}")
        at.first = loss if at.first is None else at.first
        at.recent = [*at.recent, loss][-RECENT:]
        allowed = SPIKE * max(at.first, self._learner.guessing)
        if sum(at.recent) / RECENT > allowed:
            raise TrainingFailed(f"the loss has grown to {sum(at.recent) / RECENT:.3g} {where}")

    def _watch(self) -> None:
        """Look at the rows that are watched: keep the weights if they are the best so far, else stop in the end."""
        at, stopping = self.position, self._training.early_stopping
        loss = self._watched_loss()
        if at.best is None or loss < at.best:
            at.best, at.waited = loss, 0
            self._best = [parameter.detach().clone() for parameter in self._trained]
        else:
            at.waited += 1
        log.info("loss on the latest %d rows: %.4f, the best %.4f", self._learner.watched, loss, at.best)
        if stopping is not None and at.waited >= stopping.patience:
            at.epoch = self._training.epochs

    def _watched_loss(self) -> float:
        total = torch.zeros(1, device=self._learner.device)

        def compute(rows: list[int], counted: bool) -> None:
            loss = self._learner.loss(rows, self.position.precision)
            if counted:
                total.add_(loss)

        with torch.no_grad():
            for group in batches(self._lengths[self._learned :]):
                self._on_mine([self._learned + at for at in group], compute)
        self._ranks.add_up([total])
        return total.item() / self._learner.watched

    def _save(self, checkpoint: Checkpoint) -> None:
        if self._ranks.rank:
            return
        self.position.budget = self._budget.tokens
        moments = self._optimizer.state
        tensors = {f"best.{i}": tensor for i, tensor in enumerate(self._best)}
        for i, parameter in enumerate(self._trained):
            tensors[f"weight.{i}"] = parameter
            tensors |= {f"{name}.{i}": tensor for name, tensor in moments[parameter].items()}
        checkpoint.save(tensors, self.position)

    def _resume(self, checkpoint: Checkpoint) -> bool:
        """Take up what was saved; False when there is nothing to take up."""
        found = checkpoint.load(Position)
        if found is None:
            return False
        tensors, self.position = found
        self._budget.tokens = self.position.budget
        for i, parameter in enumerate(self._trained):
            parameter.data.copy_(tensors[f"weight.{i}"])
            self._optimizer.state[parameter] = {
                name: tensors[f"{name}.{i}"].to("cpu" if name == "step" else parameter.device)
                for name in ("step", "exp_avg", "exp_avg_sq")
            }
        self._best = [tensors[f"best.{i}"].to(p.device) for i, p in enumerate(self._trained) if f"best.{i}" in tensors]
        log.info("goes on from a checkpoint: epoch %d, step %d", self.position.epoch + 1, self.position.step + 1)
        return True
