"""The reward: how a language model that learned from people's judgements expects a text to be judged.

Learning from judgements moves the model from its base, and where it went says what it holds good. The implicit reward
of a completion y of a prompt x is beta times ln of model(y | x) / base(y | x). Of two completions the log-odds that the
second is preferred are the difference of their rewards (Bradley and Terry 1952); that one completion is liked, its own
reward. Both plus a constant: one side may be chosen, or most texts liked, whatever they say.

    Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward model", NeurIPS,
    arXiv:2305.18290
    Jung et al. 2024, "Binary classifier optimization for large language model alignment", arXiv:2404.04656

So judgements of later texts can be foretold, and a model is judged by how well it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from accrual.contract import Text

if TYPE_CHECKING:
    from accrual.generator import Generator, Written

SIGNS = {1: [1.0], 2: [-1.0, 1.0]}
"""What each completion's reward counts, by how many a row has, in the log-odds of the second class."""


def written(generator: Generator, rows: Sequence[Text]) -> list[Written]:
    """The tokens of each completion with its prompt, those of a row one behind the other."""
    prompts = [row[0] for row in rows for _ in row[1:]]
    return generator.written(prompts, [text for row in rows for text in row[1:]])


def logits_of(
    generator: Generator, rows: Sequence[Text], beta: float, bias: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[rows, 2], not yet calibrated. `bias` [2] is the constant."""
    signs = np.array(SIGNS[len(rows[0]) - 1]) if rows else np.ones(1)
    ratios = generator.log_ratios(written(generator, rows)).reshape(len(rows), len(signs))
    margins = beta * ratios @ signs
    return np.column_stack([np.zeros(len(rows)), margins]) + bias
