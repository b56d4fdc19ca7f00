"""Error slices: where a model errs, before and after a cycle: what the cycle fixed, and what it broke.

Slices are the labels, the values of inputs that have few, and groups of texts of like meaning, found by clustering the
encoder's vectors (Eyuboglu et al. 2022, "Domino", arXiv:2203.14960, in its simplest form). They are found on the rows
that judged the model, so a slice that stands out among many may do so by chance: its interval is widened by
Bonferroni's rule for the number of slices looked at. The intervals are the gate's, which hold for few rows and rare
events too: the spread of a slice in which nothing happened yet says nothing of what may.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from trainer.gate import LARGEST_LOSS, gain_within

LEAST_ROWS = 20  # of a slice; fewer say nothing
_WORD = re.compile(r"[^\W\d_]{3,}")
_NAMED_BY = 4  # words


class SliceChange(msgspec.Struct, frozen=True):
    """Mean Brier score of a slice's rows `before` and `after`; `gain` is before less after, with its 95% interval."""

    kind: str
    name: str
    rows: int
    before: float
    after: float
    gain: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`fixed` or `broken` where the interval leaves 0 out, else `undecided`."""
        return "fixed" if self.low > 0 else "broken" if self.high < 0 else "undecided"


def slice_changes(
    groups: Mapping[str, Sequence[str | None]],
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    most: float = LARGEST_LOSS,
) -> list[SliceChange]:
    """The change of each slice of at least `LEAST_ROWS` rows, the worst after first.

    `groups`: for each kind the slice of every row (None: in none). `before`, `after`: each row's Brier score, of which
    no two could be more than `most` apart.
    """
    found = []
    for kind, names in groups.items():
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                rows_of.setdefault(name, []).append(row)
        found += [(kind, name, np.array(rows)) for name, rows in rows_of.items() if len(rows) >= LEAST_ROWS]
    changes = []
    for kind, name, rows in found:
        gains = before[rows] - after[rows]
        was, now = float(before[rows].mean()), float(after[rows].mean())
        low, high = gain_within(gains, 0.05 / len(found), most)
        changes.append(SliceChange(kind, name, len(rows), was, now, float(gains.mean()), low, high))
    return sorted(changes, key=lambda change: (-change.after, change.kind, change.name))


def clusters(vectors: NDArray[np.floating[Any]], texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Each row's group of like meaning by k-means, named by the words that set it apart.

    `vectors`: [rows, dimensions], of length one, so that the nearest centre is nearly the most similar one.
    """
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(vectors, axis=0)))
    if count == 0:
        return []
    group = KMeans(count, random_state=seed, n_init=1).fit_predict(vectors.astype(np.float64))
    names = _names(group, texts, count)
    return [names[k] for k in group]


def _names(group: NDArray[np.int64], texts: Sequence[str], count: int) -> list[str]:
    """The words that are more frequent in a group than in all rows: by the log-odds of the rows that have them."""
    words = [set(_WORD.findall(text.lower())) for text in texts]
    everywhere = Counter(word for row in words for word in row)
    names = []
    for k in range(count):
        inside = [words[row] for row in np.flatnonzero(group == k)]
        here = Counter(word for row in inside for word in row)

        def distinctive(word: str, here: Counter[str] = here, rows: int = len(inside)) -> float:
            return here[word] * math.log((here[word] / rows) / (everywhere[word] / len(words)))

        best = sorted(here, key=lambda word: (-distinctive(word), word))[:_NAMED_BY]
        names.append(f"{k + 1}: {' '.join(best)}")
    return names
