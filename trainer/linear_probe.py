"""The linear probe: multinomial logistic regression on an encoder's vectors, the head from which training starts.

Measured on banking77: Brier 0.282 with it, 0.322 with a head that starts at zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

STEPS = 60
# Of the squared weights, spread over the rows. Many classes with a few rows each want the first. Two classes of which
# one is rare want the second: on the credit data it beats a constant in 6 of 6 windows, the first in 3.
PENALTIES = (0.05, 1.0, 5.0)
HELD_OUT = 0.15


def linear_probe(
    vectors: torch.Tensor, truth: torch.Tensor, counts: torch.Tensor, classes: int, seed: int
) -> torch.nn.Linear:
    """A head of `classes` rows for `vectors` [rows, dimensions]; `counts`: what each row counts, 1 on average.

    The penalty is the one with the lowest loss on rows held out; then all rows are used.
    """
    mixed = torch.from_numpy(np.random.default_rng(seed).permutation(len(truth)))
    aside = int(len(truth) * HELD_OUT)
    held_out, fitted = mixed[:aside], mixed[aside:]
    losses = {}
    for penalty in PENALTIES if aside else PENALTIES[:1]:
        head = _regression(vectors[fitted], truth[fitted], counts[fitted], classes, penalty)
        with torch.no_grad():
            loss = _loss(head(vectors[held_out]), truth[held_out], counts[held_out]).item() if aside else 0.0
            losses[penalty] = loss
    return _regression(vectors, truth, counts, classes, min(losses, key=losses.__getitem__))


def _regression(
    vectors: torch.Tensor, truth: torch.Tensor, counts: torch.Tensor, classes: int, penalty: float
) -> torch.nn.Linear:
    head = torch.nn.Linear(vectors.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(head(vectors), truth, counts) + penalty / 2 * head.weight.square().sum() / len(truth)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return head


def _loss(logits: torch.Tensor, truth: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (cross_entropy(logits, truth, reduction="none") * counts).mean()
