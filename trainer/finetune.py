"""Fine-tune: a linear probe first (`linear_probe.py`), then low-rank adapters and the head together (`adapter.py`).

    the rows through the frozen layers, once; the probe on the vectors
    for each epoch, for each batch of rows of like length:
        forward and backward through the adapted layers, a step of AdamW
        now and then a checkpoint (`checkpoint.py`)
    on rows set apart, if the contract says so: is it still getting better?

The same rows and seed give the same weights on the same machine, whether or not training was killed and went on.
Several processes (`parallel.py`) take a part of every batch each.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.nn.functional import cross_entropy

from accrual.contract import Training
from accrual.encoder import Encoder, batches
from accrual.scores import indices_of
from trainer import parallel
from trainer.adapter import Beginning, TrainingFailed, adapt, first_adapted, frozen_states, layers_of, starting_at
from trainer.checkpoint import Position, load_checkpoint, save_checkpoint
from trainer.linear_probe import linear_probe

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 30  # of what the frozen layers made of the rows; beyond it they compute in every epoch
# A loss so many times the epoch's mean so far, and one more, is a spike: the weights are no longer what they were.
SPIKE = 10.0
_SPIKE_AFTER = 20  # steps of the epoch
_HEAD = "head."


class Start(msgspec.Struct, frozen=True):
    """What training goes on from instead of the base: the champion's adapter, and its head's `weight` and `bias`."""

    adapter: Path
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


class Tuned:
    """What fine-tuning made: the head, and the encoder with its adapter in place."""

    def __init__(
        self, encoder: Encoder, classes: list[str], weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> None:
        self.encoder = encoder
        self.classes = classes
        self.weight = weight
        self.bias = bias

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[texts, classes], not yet calibrated."""
        return np.asarray(self.encoder.embed(texts) @ self.weight.T + self.bias, dtype=np.float32)


def fine_tune(
    encoder: Encoder,
    texts: Sequence[str],
    labels: Sequence[str],
    classes: Sequence[str],
    training: Training,
    seed: int,
    weights: Sequence[float] | None = None,
    start: Start | None = None,
    checkpoint: Path | None = None,
) -> Tuned:
    """Train on rows of text and label, oldest first. `classes` come first, labels that are none of them come after.

    `weights`: what each row counts in the loss, against the others; all the same by default. `start`: go on from the
    champion, whose classes are `classes`. `checkpoint`: a file to go on from, and to write now and then.
    `encoder` is a fresh copy of the base; it is changed. Raises TrainingFailed when the rows have fewer than two
    labels, the loss is not finite or jumps, or a single row does not fit into memory.
    """
    if len(set(labels)) < 2:
        raise TrainingFailed(f"{len(labels)} rows with {len(set(labels))} label(s): nothing to tell apart")
    torch.manual_seed(seed)
    known = [*classes, *sorted(set(labels) - set(classes))]
    truth = torch.from_numpy(indices_of(labels, known))
    counts = torch.tensor(weights if weights is not None else [1.0] * len(labels), dtype=torch.float32)
    counts = counts / counts.mean()
    tokens = encoder.tokenize(texts)
    first = first_adapted(encoder, training.lora)
    adapt(encoder, training.lora, start.adapter if start else None)
    keep = sum(map(len, tokens)) * encoder.model.config.hidden_size * 4 <= CACHE_BYTES
    states, vectors = frozen_states(encoder, tokens, first, keep)
    key = _key(texts, labels, known, training, seed, counts)
    saved = load_checkpoint(checkpoint, key) if checkpoint else None
    apart = _apart(len(tokens), training)
    head = torch.nn.Linear(vectors.shape[1], len(known))
    if saved is None:
        upto = len(tokens) - apart
        head = linear_probe(vectors[:upto], truth[:upto], counts[:upto], len(known), seed)
        if start is not None:
            with torch.no_grad():
                head.weight[: len(start.weight)] = torch.from_numpy(start.weight)
                head.bias[: len(start.bias)] = torch.from_numpy(start.bias)
    loop = _Loop(encoder, head, tokens, truth, counts, states, training, seed, apart)
    position = Position() if saved is None else loop.restore(*saved)
    if states is None:
        loop.run(position, None, checkpoint, key)
    else:
        with starting_at(layers_of(encoder.model), first) as begin:
            loop.run(position, begin, checkpoint, key)
    return Tuned(
        encoder,
        known,
        head.weight.detach().numpy().astype(np.float32),
        head.bias.detach().numpy().astype(np.float32),
    )


class _Loop:
    """The epochs: adapters and head by AdamW, the learning rate falling to zero along a half cosine."""

    def __init__(
        self,
        encoder: Encoder,
        head: torch.nn.Linear,
        tokens: Sequence[Sequence[int]],
        truth: torch.Tensor,
        counts: torch.Tensor,
        states: list[torch.Tensor] | None,
        training: Training,
        seed: int,
        apart: int,
    ) -> None:
        """`apart`: so many of the rows, the latest, only say when to stop."""
        self._encoder, self._head = encoder, head
        self._tokens, self._truth, self._counts, self._states = tokens, truth, counts, states
        self._training, self._seed = training, seed
        self._learned = len(tokens) - apart
        named = [(name, p) for name, p in encoder.model.named_parameters() if p.requires_grad]
        self._trained = dict(named) | {f"{_HEAD}{name}": p for name, p in head.named_parameters()}
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=training.learning_rate, weight_decay=0.01)
        self._lengths = [len(t) for t in tokens[: self._learned]]
        self._steps_in_epoch = math.ceil(len(list(batches(self._lengths))) / training.accumulate)
        self._best: dict[str, torch.Tensor] = {}
        self._most_rows = self._learned  # through the model at once; halved when memory is out
        self._begin: Beginning | None = None

    def run(self, position: Position, begin: Beginning | None, checkpoint: Path | None, key: str) -> None:
        """Train from a position to the end. The encoder is left with the weights of the best epoch."""
        self._begin = begin
        training = self._training
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("training", total=training.epochs * self._steps_in_epoch, completed=position.steps)
            for epoch in range(position.epoch, training.epochs):
                for rows in self._batches(epoch, position.in_epoch):
                    loss = self._step(rows, position)
                    position = msgspec.structs.replace(
                        position,
                        in_epoch=position.in_epoch + 1,
                        steps=position.steps + 1,
                        loss=position.loss + loss,
                    )
                    progress.update(task, completed=position.steps)
                    if checkpoint and position.steps % training.checkpoint_every == 0 and parallel.rank() == 0:
                        save_checkpoint(checkpoint, key, position, self._tensors())
                mean = position.loss / max(position.in_epoch, 1)
                position = msgspec.structs.replace(position, epoch=epoch + 1, in_epoch=0, loss=0.0)
                log.info("epoch %d of %d: loss %.4f", epoch + 1, training.epochs, mean)
                if training.early_stopping is not None:
                    position = self._compare(position)
                    if position.bad > training.early_stopping.patience:
                        log.info("stopped: no better for %d epochs on the rows set apart", position.bad)
                        break
        with torch.no_grad():
            for name, tensor in self._best.items():
                self._trained[name].copy_(tensor)

    def restore(self, position: Position, tensors: dict[str, torch.Tensor]) -> Position:
        """Take weights and the optimizer's state from a checkpoint; its position."""
        state = self._optimizer.state_dict()
        with torch.no_grad():
            for place, (name, parameter) in enumerate(self._trained.items()):
                parameter.copy_(tensors[name])
                kept = {of: tensors[f"{of}:{name}"] for of in ("step", "exp_avg", "exp_avg_sq")}
                state["state"][place] = kept
                if f"best:{name}" in tensors:
                    self._best[name] = tensors[f"best:{name}"]
        self._optimizer.load_state_dict(state)
        log.info("training goes on after step %d", position.steps)
        return position

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {name: parameter.detach() for name, parameter in self._trained.items()}
        for name, parameter in self._trained.items():
            found |= {f"{of}:{name}": value for of, value in self._optimizer.state[parameter].items()}
        return found | {f"best:{name}": tensor for name, tensor in self._best.items()}

    def _batches(self, epoch: int, after: int) -> Iterator[list[int]]:
        """The rows of each step of an epoch but the first `after`, in an order that only seed and epoch decide."""
        chance = np.random.default_rng([self._seed, epoch])
        mixed = chance.permutation(self._learned)
        groups = [[int(mixed[i]) for i in group] for group in batches([self._lengths[row] for row in mixed])]
        order = chance.permutation(len(groups))
        for step in range(after, self._steps_in_epoch):
            own = order[step * self._training.accumulate : (step + 1) * self._training.accumulate]
            yield [row for group in own for row in groups[group]]

    def _step(self, rows: list[int], position: Position) -> float:
        """One step on these rows; their mean loss before it."""
        total = self._training.epochs * self._steps_in_epoch
        for group in self._optimizer.param_groups:
            group["lr"] = self._training.learning_rate * 0.5 * (1 + math.cos(math.pi * position.steps / total))
        loss = self._gradients(rows)
        where = f"in epoch {position.epoch + 1}, step {position.steps + 1}"
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} {where}")
        mean = position.loss / max(position.in_epoch, 1)
        if position.in_epoch >= _SPIKE_AFTER and loss > SPIKE * mean + 1:
            raise TrainingFailed(f"the loss jumped from {mean:.3g} to {loss:.3g} {where}")
        torch.nn.utils.clip_grad_norm_(self._trained.values(), 1.0)
        self._optimizer.step()
        return loss

    def _gradients(self, rows: list[int]) -> float:
        """Leave the gradients of the rows' mean loss in the parameters, summed over pieces and processes."""
        mine = [row for row in rows if row % parallel.size() == parallel.rank()]
        while True:
            self._optimizer.zero_grad(set_to_none=False)
            try:
                # Rows of like length come together again: those of several batches are mixed.
                pieces = self._pieces(mine)
                loss = sum((self._backward(piece, len(rows)) for piece in pieces), torch.zeros(()))
                break
            except (RuntimeError, MemoryError) as exc:
                if not _out_of_memory(exc) or parallel.size() > 1:
                    raise
                largest = max(map(len, self._pieces(mine)))
                if largest == 1:
                    raise TrainingFailed(f"out of memory on a single row: {exc}") from exc
                self._most_rows = largest // 2
                log.warning("out of memory: at most %d rows go through the model at once from now on", self._most_rows)
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        parallel.add_up([*(p.grad for p in self._trained.values() if p.grad is not None), loss])
        return float(loss)

    def _pieces(self, rows: list[int]) -> list[list[int]]:
        """Rows as they go through the model: within the token budget, and as many as memory has room for."""
        groups = [[rows[i] for i in group] for group in batches([self._lengths[row] for row in rows])]
        return [group[i : i + self._most_rows] for group in groups for i in range(0, len(group), self._most_rows)]

    def _backward(self, rows: list[int], of: int) -> torch.Tensor:
        """Add the gradients of these rows' share in the mean loss `of` so many; that share."""
        losses = cross_entropy(self._logits(rows), self._truth[rows], reduction="none") * self._counts[rows]
        loss = losses.sum() / of
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _logits(self, rows: list[int]) -> torch.Tensor:
        if self._begin is not None and self._states is not None:
            self._begin.states = torch.nn.utils.rnn.pad_sequence([self._states[i] for i in rows], batch_first=True)
        logits: torch.Tensor = self._head(self._encoder.pooled([self._tokens[i] for i in rows]))
        return logits

    def _compare(self, position: Position) -> Position:
        """After an epoch: the weights are the best so far, or it is one more that was no better."""
        rows = range(self._learned, len(self._tokens))
        groups = batches([len(self._tokens[row]) for row in rows])
        with torch.no_grad():
            losses = [
                cross_entropy(self._logits(own), self._truth[own], reduction="none") * self._counts[own]
                for own in ([rows[i] for i in group] for group in groups)
            ]
        loss = float(torch.cat(losses).mean())
        log.info("on %d later rows set apart: loss %.4f", len(rows), loss)
        if position.best is None or loss < position.best:
            self._best = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
            return msgspec.structs.replace(position, best=loss, bad=0)
        return msgspec.structs.replace(position, bad=position.bad + 1)


def _apart(rows: int, training: Training) -> int:
    return 0 if training.early_stopping is None else max(1, int(rows * training.early_stopping.share))


def _key(
    texts: Sequence[str],
    labels: Sequence[str],
    classes: Sequence[str],
    training: Training,
    seed: int,
    counts: torch.Tensor,
) -> str:
    """A digest of all that the weights depend on, but for the base and the code of this project."""
    depends = [list(texts), list(labels), list(classes), training, seed, counts.tolist(), str(torch.__version__)]
    return hashlib.sha256(msgspec.json.encode(depends)).hexdigest()


def _out_of_memory(exc: BaseException) -> bool:
    said = str(exc).lower()
    return isinstance(exc, MemoryError) or "out of memory" in said or "can't allocate memory" in said
