"""Fine-tune: a linear probe first, then low-rank adapters and the head together.

    prepare.py     a copy of the base that can learn
    adapter.py     what learns, and the states that never change: computed once for each row
    probe.py       the head from which training starts
    learner.py     what the loop trains: adapter and head
    distill.py     general text beside the rows, answered as the base does
    loop.py        epochs, steps, early stopping
    checkpoint.py  where it stands, so that a killed training goes on
    memory.py      batches in pieces when memory runs out
    precision.py   fp32 or bf16, measured
    ranks.py       several processes, one training
    shard.py       and a base of which each of them holds a part

No dropout, so the one pass that fills the cache of states also gives the vectors for the probe. The same rows and seed
give the same weights on the same machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from accrual.contract import Text, flattened
from accrual.encoder import Encoder
from accrual.errors import TrainingFailed
from accrual.layers import starting_at
from accrual.output import Output
from accrual.scores import truth_of
from accrual.training_policy import Training
from trainer.adapter import States, frozen_states
from trainer.checkpoint import checkpoint_of
from trainer.learner import Classifier, Rows, counts_of, texts_of, watched_of
from trainer.loop import Loop
from trainer.precision import Precision, of_frozen
from trainer.prepare import prepare
from trainer.probe import probe
from trainer.ranks import Ranks

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

    model: Encoder
    classes: list[str]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    start: Literal["base", "champion"] = "base"
    precision: Precision = "fp32"

    def logits(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """[texts, classes], not yet calibrated."""
        return np.asarray(self.model.vectors(texts) @ self.weight.T + self.bias, dtype=np.float32)


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
    sharded: bool = False,
) -> Tuned:
    """Train on rows of text and label, oldest first. `classes` come first, labels that are none of them become
    further ones. `output`: what the labels mean.

    `encoder` is a fresh copy of the base, for pairs where `texts` are; it is changed. `weights`: how much each row
    counts, to any scale; all the same by default. `start`: the champion whose adapter and head are gone on from, whose
    classes `classes` are.
    `checkpoint`: the file in which the state is kept, and from which the same training goes on. Where
    torch.distributed is initialised all ranks call this with the same arguments, share the work and return the same
    weights. `sharded`: they share the frozen layers too, and the model is returned in parts, for `make_whole`.

    Raises TrainingFailed when the rows have fewer than two labels, weights are no weights, the loss is not finite or
    grows, or one row alone does not fit into memory.
    """
    if len(set(labels)) < 2:
        raise TrainingFailed(f"{len(labels)} rows with {len(set(labels))} label(s): nothing to tell apart")
    torch.manual_seed(seed)
    begun_at = start.adapter.parent.name if start else None
    depends_on = (texts, labels, classes, training, seed, weights, begun_at, output, encoder.pair)
    kept = checkpoint_of(checkpoint, encoder.model, *depends_on)
    ready = prepare(encoder, len(labels), training, start.adapter if start is not None else None, sharded)
    known = output.known(classes, labels)
    truth = torch.from_numpy(truth_of(output, labels, known)).to(encoder.device)
    truth = truth.float() if output.each else truth
    counts = counts_of(weights, len(labels)).to(encoder.device)
    tokens = encoder.tokenize(flattened(texts))
    states, vectors = _frozen(encoder, tokens, ready.first, sharded, of_frozen(training.precision))
    watched = watched_of(len(labels), training)
    learned = slice(0, len(labels) - watched)
    blank = _blank(encoder, len(known), start if ready.warm else None)
    head = probe(vectors[learned], truth[learned], counts[learned], blank, seed, len(classes) if ready.warm else 0)
    rows = Rows(tokens, states, truth, counts, encoder.texts_a_row)
    with starting_at(encoder.model, ready.first, training.gradient_checkpointing) as begin:
        loop = Loop(ready.beside(Classifier(encoder, head, rows, begin, watched), begin), training, seed, sharded)
        loop.run(kept)
    return Tuned(
        encoder,
        known,
        head.weight.detach().cpu().numpy(),
        head.bias.detach().cpu().numpy(),
        "champion" if ready.warm else "base",
        loop.position.precision,
    )


def _frozen(
    encoder: Encoder, tokens: Sequence[Sequence[int]], first: int, sharded: bool, precision: Precision
) -> tuple[States, torch.Tensor]:
    """For each text of this rank the states that enter layer `first`, and for all rows their vectors by now."""
    each, ranks = encoder.texts_a_row, Ranks()
    mine = texts_of(ranks.mine(range(len(tokens) // each)), each)
    vectors = torch.zeros(len(tokens), encoder.model.config.hidden_size, device=encoder.device)

    def forward(texts: list[int]) -> None:
        vectors[texts] = encoder.pooled([tokens[text] for text in texts]).float()

    states = frozen_states(encoder.model, [len(text) for text in tokens], mine, first, forward, sharded, precision)
    others = torch.ones(len(tokens), dtype=torch.bool)
    others[mine] = False
    vectors[others.to(encoder.device)] = 0.0  # some were computed to keep in step
    ranks.add_up([vectors])
    return states, encoder.joined(vectors)


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
