"""The matrix R: every published generation on every window, on rows that none of them learned from.

R[i, j] is the Brier score of generation i on the held-out rows of window j (`select.py`). From it, as positive
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

from accrual.bundle import read_classes, weights_from
from accrual.config import Config
from accrual.contract import Contract, load_contract
from accrual.lake import open_lake
from trainer.evaluate import Scored, score
from trainer.generations import Candidate, bundle_of, predictor_of
from trainer.select import LAKE_MEMORY, Window, held_out_rows


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
    config: Config,
    contract: Contract,
    models: Sequence[Candidate],
    windows: Sequence[Window],
    shown: Callable[[Sequence[Candidate]], Iterable[Candidate]],
) -> Matrix:
    """Score published models on the held-out rows of windows, each as it was when it was sealed.

    Held out from all of them: where `training.held_out` has changed, the rows of the smallest share. Windows without
    such rows are left out. `shown` passes the models on. Raises LakeUnavailable, and BundleError when a bundle is gone
    or altered.
    """
    folders = [bundle_of(config, model) for model in models]
    classes = [name for folder in folders for name in read_classes(folder)]
    taught_by = {part for folder in folders for part in weights_from(folder.parent, folder.name)}
    contracts = [contract, *(load_contract(folder / "contract.yaml") for folder in taught_by)]
    training = msgspec.structs.replace(contract.training, held_out=min(one.training.held_out for one in contracts))
    contract = msgspec.structs.replace(contract, training=training)
    brier, accuracy, learned = [], [], []
    judged: list[Scored] = []
    for model in shown(models):
        predictor, scored = predictor_of(config, model), []
        for window in windows:
            with open_lake(config, at_snapshot=window.snapshot_id, memory=LAKE_MEMORY) as lake:
                rows = held_out_rows(lake, contract, window, predictor.contract)
                scored.append(score(predictor, window, rows, classes))
        judged = [one for one in scored if len(one.ids)]
        taught = model.published.windows if model.published else model.run.windows if model.run else []
        brier.append([float(one.judged.brier.mean()) for one in judged])
        accuracy.append([one.judged.accuracy for one in judged])
        learned.append([one.window.window in taught for one in judged])
    return Matrix(
        models=[model.model for model in models],
        windows=[one.window.window for one in judged],
        rows=[len(one.ids) for one in judged],
        brier=brier,
        accuracy=accuracy,
        learned=learned,
    )


def _mean(found: Sequence[float]) -> float | None:
    return sum(found) / len(found) if found else None
