"""Ground truth that came twice on the topic: the same prediction and revision under another offset.

The lake's moves see to it that no record is written twice; this finds two records that say the same, such as those of a
topic that was restored, of a foreign producer or of a mistake in the join. The second one goes to the table `doubles`
with what it repeats, in the same transaction, and the audit shows it.

A filter of digests remembers the last 200,000 to 400,000 rows of each partition. What it suspects is looked up in the
lake, by stream and day, so a collision of digests does no harm. What is older than that is found by the audit alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from accrual.lake import Lake, Move
from accrual.lake_tables import TABLES

REMEMBERED = 200_000
_EQUAL = ("status", "label", "observed_at", "values")

# The suspected rows, each with the one it repeats: of all rows with its key the one with the least offset.
_REPEATED = f"""
with known as (
    select {{columns}} from ground_truth_history
    where stream in (select stream from suspects) and day in (select day from suspects)
        and prediction_id in (select prediction_id from suspects)
    union all select {{columns}} from suspects
),
firsts as (
    from known qualify row_number() over (
        partition by stream, prediction_id, revision, "partition" order by "offset"
    ) = 1
)
select s.*, f."offset" as first_offset,
    if({" and ".join(f'f."{name}" is not distinct from s."{name}"' for name in _EQUAL)}, 'equal', 'different') as why
from suspects s join firsts f using (stream, prediction_id, revision, "partition")
where f."offset" < s."offset"
"""
Digests = npt.NDArray[np.int64]


class _Recent:
    """The digests of a partition's last rows, up to the offset `at`, in two sorted arrays."""

    def __init__(self, digests: Digests) -> None:
        self.at = 0
        self._young = np.sort(digests)
        self._old = self._young[:0]

    def has(self, digests: Digests) -> npt.NDArray[np.bool_]:
        """Which of the digests it remembers."""
        return _among(digests, self._young) | _among(digests, self._old)

    def add(self, digests: Digests) -> None:
        """Remember these too, and forget the oldest ones when they are too many."""
        ordered = np.sort(digests)
        self._young = np.insert(self._young, np.searchsorted(self._young, ordered), ordered)
        if len(self._young) >= REMEMBERED:
            self._old, self._young = self._young, self._young[:0]


class Doubles:
    """Sets apart what came twice. One for each time that the lake is opened; used by the sink's thread."""

    def __init__(self, lake: Lake) -> None:
        self._lake = lake
        self._recent: dict[int, _Recent] = {}

    def set_apart(self, rows: pa.Table | None, moves: Sequence[Move]) -> dict[str, pa.Table]:
        """What of a batch of ground truth goes to which table, none when there is nothing to set apart.

        `moves` are those of the ground-truth topic that the batch makes. They count as made: when the commit fails, the
        lake is opened anew and so is this.
        """
        for move in moves:
            self._stand(move)
        if rows is None:
            return {}
        digests, partitions = _digests(rows), rows["partition"].to_numpy()
        suspected = np.zeros(len(digests), dtype=bool)
        for partition in np.unique(partitions):
            mine = partitions == partition
            recent = self._recent[int(partition)]
            suspected[mine] = recent.has(digests[mine]) | _repeated(digests[mine])
            recent.add(digests[mine])
        if not suspected.any():
            return {}
        columns = ", ".join(f'"{name}"' for name in TABLES["ground_truth_history"].names)
        with self._lake.with_tables({"suspects": rows.filter(pa.array(suspected))}):
            doubles = self._lake.arrow(_REPEATED.format(columns=columns))
        with self._lake.with_tables({"batch": rows, "apart": doubles}):
            kept = self._lake.arrow('from batch anti join apart using ("partition", "offset")')
        return {"ground_truth_history": kept, "doubles": doubles} if len(doubles) else {}

    def _stand(self, move: Move) -> None:
        """Remember a partition up to this move; from the lake if this sink did not make the move before it."""
        known = self._recent.get(move.partition)
        if known is None or known.at != move.expected:
            rows = self._lake.arrow(
                'select prediction_id, revision from ground_truth_history where "partition" = ? and "offset" >= ?',
                [move.partition, move.expected - REMEMBERED],
            )
            known = self._recent[move.partition] = _Recent(_digests(rows))
        known.at = move.next


def _digests(rows: pa.Table) -> Digests:
    """Of prediction and revision; they are the same within a process only."""
    keys = zip(rows["prediction_id"].to_pylist(), rows["revision"].to_pylist(), strict=True)
    return np.fromiter(map(hash, keys), np.int64, len(rows))


def _among(digests: Digests, ordered: Digests) -> npt.NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(digests), dtype=bool)
    found: npt.NDArray[np.bool_] = ordered[np.searchsorted(ordered, digests).clip(max=len(ordered) - 1)] == digests
    return found


def _repeated(digests: Digests) -> npt.NDArray[np.bool_]:
    """Which digests are in the batch more than once."""
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    repeated: npt.NDArray[np.bool_] = counts[inverse] > 1
    return repeated
