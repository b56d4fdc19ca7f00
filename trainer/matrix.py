"""The matrix R: every published generation on every window, on rows that none of them learned from.

R[i, j] is the Brier score of generation i on the held-out rows of window j (`held_out.py`). From it, as positive
numbers where things are better (Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory", arXiv:1706.08840; Chaudhry et
al. 2018, "Riemannian Walk", arXiv:1801.10112):

    backward transfer   the last generation, against the one that first learned a window, on that window
    forward transfer    the last generation that had not learned a window, against generation 0, on that window
    forgetting          the last generation, against the best before it that had learned a window, on that window
    gain                the last generation, against generation 0, on all windows

each the mean over the windows for which it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from accrual.predictor import Predictor
from trainer.generations import Candidate
from trainer.select import Window
from trainer.weigh import Row


class Matrix(msgspec.Struct, frozen=True):
    """`brier` and `accuracy`: [models, windows]. `learned`: whether a model learned from a window. `rows`: held out."""

    models: list[str]
    windows: list[int]
    rows: list[int]
    brier: list[list[float]]
    accuracy: list[list[float]]
    learned: list[list[bool]]

    @property
    def backward_transfer(self) -> float | None:
        """See the module's text; None where no window was learned before the last generation."""
        return _mean(
            [
                self.brier[first][j] - self.brier[-1][j]
                for j in range(len(self.windows))
                if (first := self._first(j)) is not None and first < len(self.models) - 1
            ]
        )

    @property
    def forward_transfer(self) -> float | None:
        """See the module's text; None where no generation but 0 came before a window."""
        found = []
        for j in range(len(self.windows)):
            first = self._first(j)
            before = (len(self.models) if first is None else first) - 1
            if before > 0:
                found.append(self.brier[0][j] - self.brier[before][j])
        return _mean(found)

    @property
    def forgetting(self) -> float | None:
        """See the module's text; negative where the last generation is better than all before it."""
        found = []
        for j in range(len(self.windows)):
            first = self._first(j)
            if first is not None and first < len(self.models) - 1:
                found.append(self.brier[-1][j] - min(row[j] for row in self.brier[first:-1]))
        return _mean(found)

    @property
    def gain(self) -> float | None:
        """Against generation 0, on all windows."""
        return _mean([self.brier[0][j] - self.brier[-1][j] for j in range(len(self.windows))])

    def _first(self, window: int) -> int | None:
        """The place of the first model that learned from a window, given by its place."""
        return next((i for i, row in enumerate(self.learned) if row[window]), None)


def matrix(
    models: Iterable[Candidate],
    windows: Sequence[Window],
    rows: Sequence[Sequence[Row]],
    load: Callable[[str | None], Predictor],
) -> Matrix:
    """Score published models on the held-out rows of windows; windows without such rows are left out.

    `load` gives the predictor of a bundle. Raises BundleError when one is gone or altered.
    """
    shown = [(window, some) for window, some in zip(windows, rows, strict=True) if some]
    texts, labels = [row.text for _, some in shown for row in some], [row.label for _, some in shown for row in some]
    ends = np.cumsum([len(some) for _, some in shown])[:-1]
    names, brier, accuracy, learned = [], [], [], []
    for model in models:
        predictor = load(model.bundle)
        found = predictor.judge(texts, labels)
        brier.append(_by_window(found.brier, ends))
        taught = model.published.windows if model.published else model.run.windows if model.run else []
        names.append(model.model)
        learned.append([window.window in taught for window, _ in shown])
        accuracy.append(_by_window(found.hits, ends))
    return Matrix(
        models=names,
        windows=[window.window for window, _ in shown],
        rows=[len(some) for _, some in shown],
        brier=brier,
        accuracy=accuracy,
        learned=learned,
    )


def _by_window(values: NDArray[np.float64], ends: NDArray[np.int64]) -> list[float]:
    return [float(part.mean()) for part in np.split(values, ends)] if len(values) else []


def _mean(found: Sequence[float]) -> float | None:
    return sum(found) / len(found) if found else None
