"""What the join says of itself in numbers: it fills the metrics that `accrual/metrics.py` lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from accrual import metrics
from accrual.contract import Contract
from accrual.events import DeadLetter
from streams.partition import Partition
from streams.turn import Turn


def count(turns: Iterable[Turn], rejected: Iterable[DeadLetter], seconds: float) -> None:
    """Add what a commit that took `seconds` brought."""
    metrics.JOIN_COMMIT_SECONDS.observe(seconds)
    for letter in rejected:
        metrics.JOIN_DEAD_LETTERS.labels(letter.reason).inc()
    for turn in turns:
        for what, number in turn.counts.items():
            metrics.JOIN_EVENTS.labels(what).inc(number)
        metrics.JOIN_EVENTS.labels("forwarded").inc(len(turn.strays))
        for letter in turn.letters:
            metrics.JOIN_DEAD_LETTERS.labels(letter.reason).inc()
        for stream, delays in turn.delays.items():
            metrics.JOIN_LABEL_DELAY.add(stream, delays)


def measure(partitions: Iterable[Partition], contracts: Mapping[str, Contract]) -> None:
    """Set what is so now, over all partitions of this worker."""
    pending: defaultdict[str, int] = defaultdict(int)
    watermarks: defaultdict[str, list[int]] = defaultdict(list)
    oldest: defaultdict[str, list[int]] = defaultdict(list)
    for partition in partitions:
        for stream, progress in partition.state.progress.items():
            if stream in contracts:
                pending[stream] += progress.pending
                watermarks[stream].append(progress.watermark)
                if progress.pending and (moment := partition.oldest_pending(stream)) is not None:
                    oldest[stream].append(moment)
    for stream in contracts:
        metrics.JOIN_PENDING.labels(stream).set(pending[stream])
        metrics.JOIN_WATERMARK.labels(stream).set(min(watermarks[stream], default=0) / 1e6)
        metrics.JOIN_OLDEST_PENDING.labels(stream).set(min(oldest[stream], default=0) / 1e6)
