"""Fine-tune: a linear probe first, then low-rank adapters and the head together.

    adapter.py     what learns, and the states that never change: computed once for each row
    probe.py       the head from which training starts
    loop.py        epochs, steps, early stopping
    checkpoint.py  where it stands, so that a killed training goes on
    memory.py      batches in pieces when memory runs out
    precision.py   fp32 or bf16, measured
    ranks.py       several processes, one training

No dropout, so the one pass that fills the cache of states also gives the vectors for the probe. The same rows and seed
give the same weights on the same machine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from accrual.contract import Text, Training
from accrual.encoder import Encoder, batch_tokens
from accrual.errors import TrainingFailed
from accrual.output import Output
from accrual.scores import truth_of
from trainer.adapter import adapt, frozen_states, layers_of, starting_at, take_over
from trainer.checkpoint import Checkpoint, digest_of
from trainer.loop import Loop, Rows
from trainer.memory import Budget
from trainer.precision import Precision
from trainer.probe import probe
from trainer.ranks import Ranks

log = logging.getLogger(__name__)

ONE_CLASS = Output()


@dataclass(frozen=True)
class Start:
    """A champion to go on from: the folder of its adapter, and its head, [classes, dimensions] and [classes]."""

    adapter: Path
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning made: the head, and the encoder with its adapter in place. `start` and `precision`: how."""

    encoder: Encoder
    classes: list[str]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    start: Literal["base", "champion"] = "base"
    precision: Precision = "fp32"

    def logits(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """[texts, classes], not yet calibrated."""
        return np.asarray(self.encoder.vectors(texts) @ self.weight.T + self.bias, dtype=np.float32)


def fine_tune(
    encoder: Encoder,
    texts: Sequence[Text],
    labels: Sequence[str],
    classes: Sequence[str],
    training: Training,
    seed: int,
    weights: Sequence[float] | None = None,
    start: Start | None = None,
    checkpoint: Path | None = None,
    output: Output = ONE_CLASS,
) -> Tuned:
    """Train on rows of text and label, oldest first. `classes` come first, labels that are none of them become
    further ones. `output`: what the labels mean.

    `encoder` is a fresh copy of the base, for pairs where `texts` are; it is changed. `weights`: how much each row
    counts, to any scale; all the same by default. `start`: the champion whose adapter and head are gone on from, whose
    classes `classes` are.
    `checkpoint`: the file in which the state is kept, and from which the same training goes on. Where
    torch.distributed is initialised all ranks call this with the same arguments, share the work and return the same
    weights.

    Raises TrainingFailed when the rows have fewer than two labels, weights are no weights, the loss is not finite or
    grows, or one row alone does not fit into memory.
    """
    if len(set(labels)) < 2:
        raise TrainingFailed(f"{len(labels)} rows with {len(set(labels))} label(s): nothing to tell apart")
    torch.manual_seed(seed)
    key = _key(encoder, texts, labels, classes, training, seed, weights, start, output) if checkpoint else ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.model.to(device)
    known = output.known(classes, labels)
    truth = torch.from_numpy(truth_of(output, labels, known)).to(device)
    truth = truth.float() if output.each else truth
    counts = _counts(weights, len(labels)).to(device)
    adapt(encoder, training.lora)
    warm = start is not None and take_over(encoder, start.adapter)
    depth = len(layers_of(encoder.model))
    first = max(0, depth - training.lora.layers)
    tokens = encoder.tokenize(encoder.texts_of(texts))
    states, vectors = frozen_states(encoder, tokens, first, Budget(batch_tokens(device)), Ranks())
    watched = _watched(len(labels), training)
    learned = slice(0, len(labels) - watched)
    blank = _blank(encoder, len(known), start if warm else None)
    head = probe(vectors[learned], truth[learned], counts[learned], blank, seed, len(classes) if warm else 0)
    rows = Rows(tokens, states, truth, counts, watched, encoder.texts_a_row)
    with starting_at(encoder, first, training.gradient_checkpointing) as begin:
        loop = Loop(encoder, head, rows, begin, training, seed)
        loop.run(Checkpoint(checkpoint, key) if checkpoint else None)
    return Tuned(
        encoder,
        known,
        head.weight.detach().cpu().numpy(),
        head.bias.detach().cpu().numpy(),
        "champion" if warm else "base",
        loop.position.precision,
    )


def _counts(weights: Sequence[float] | None, rows: int) -> torch.Tensor:
    """How much each row counts, 1 on average."""
    if weights is None:
        return torch.ones(rows)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (rows,) or not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise TrainingFailed(f"{rows} rows need as many weights: finite, none below 0, not all of them 0")
    return torch.from_numpy(given / given.mean()).float()


def _watched(rows: int, training: Training) -> int:
    """How many of the latest rows early stopping looks at."""
    if training.early_stopping is None:
        return 0
    return min(rows - 1, max(1, round(rows * training.early_stopping.share)))


def _blank(encoder: Encoder, classes: int, start: Start | None) -> torch.nn.Linear:
    """The head that the probe begins at: a champion's, zero for classes that it does not have."""
    head = torch.nn.Linear(encoder.dimensions, classes, device=encoder.device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        if start is not None:
            head.weight[: len(start.bias)] = torch.from_numpy(start.weight)
            head.bias[: len(start.bias)] = torch.from_numpy(start.bias)
    return head.requires_grad_(False)


def _key(
    encoder: Encoder,
    texts: Sequence[Text],
    labels: Sequence[str],
    classes: Sequence[str],
    training: Training,
    seed: int,
    weights: Sequence[float] | None,
    start: Start | None,
    output: Output,
) -> str:
    """A digest of all that the weights depend on."""
    content = msgspec.json.encode(
        [
            texts,
            labels,
            classes,
            training,
            seed,
            weights,
            start.adapter.parent.name if start else None,
            output,
            encoder.pair,
            digest_of(encoder.model.state_dict()),
            [version(name) for name in ("accrual", "peft", "torch", "transformers")],
            [torch.get_num_threads(), Ranks().world],
        ]
    )
    return hashlib.sha256(content).hexdigest()
