"""Every metric of the stages, in one list; Prometheus's default registry.

Needs prometheus_client, which the stages install: `import accrual` does not load this.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


class DelayHistogram(Collector):
    """A histogram by stream that takes a batch at once: prometheus_client's own takes microseconds for each value."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, bounds
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        REGISTRY.register(self)

    def add(self, stream: str, delays: Iterable[int]) -> None:
        """Add delays of a stream, in microseconds."""
        counts = self._counts.setdefault(stream, [0] * (len(self._bounds) + 1))
        total = 0.0
        for delay in delays:
            seconds = delay / 1e6
            counts[bisect_left(self._bounds, seconds)] += 1
            total += seconds
        self._sums[stream] = self._sums.get(stream, 0.0) + total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["stream"])
        for stream, counts in self._counts.items():
            so_far, buckets = 0, []
            for bound, number in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
                so_far += number
                buckets.append((bound, so_far))
            family.add_metric([stream], buckets, self._sums[stream])
        yield family


# The join worker (streams/loop.py).

# Events by what became of them: labeled and expired rows, duplicate_prediction, duplicate_outcome, late_outcome
# (observed after the horizon, in a stream that only counts those), forwarded (came in a wrong partition).
JOIN_EVENTS = Counter("accrual_join_events", "What became of events", ["became"])
# Dead letters by reason (accrual.events.REASONS). A rise means that some producer breaks its contract.
JOIN_DEAD_LETTERS = Counter("accrual_join_dead_letters", "Events that broke their contract", ["reason"])
# Records on the broker that this worker has not joined yet. A lasting rise: add a worker.
JOIN_LAG = Gauge("accrual_join_lag_records", "Records not joined yet")
# Predictions without a label that have not expired.
JOIN_PENDING = Gauge("accrual_join_pending_predictions", "Predictions that wait for a label", ["stream"])
# When the oldest of them was made: Unix time, 0 when there is none; it may be said to be a little older than it is.
JOIN_OLDEST_PENDING = Gauge("accrual_join_oldest_pending_seconds", "Event time of the oldest of them", ["stream"])
# How far event time has come, in the slowest partition: Unix time. `time()` less it is the watermark's delay.
JOIN_WATERMARK = Gauge("accrual_join_watermark_seconds", "The watermark", ["stream"])
# From a prediction to the outcome that first labeled it, in event time.
JOIN_LABEL_DELAY = DelayHistogram(
    "accrual_join_label_delay_seconds",
    "From prediction to outcome",
    (
        1.0,
        10.0,
        MINUTE,
        10 * MINUTE,
        HOUR,
        6 * HOUR,
        DAY,
        7 * DAY,
        30 * DAY,
        90 * DAY,
        180 * DAY,
        365 * DAY,
        1095 * DAY,
    ),
)
# From the join's result to its commit by the broker.
JOIN_COMMIT_SECONDS = Histogram("accrual_join_commit_seconds", "Duration of one Kafka transaction")
# Times the worker started again from what is committed: the broker was away, a transaction failed.
JOIN_SESSIONS_FAILED = Counter("accrual_join_sessions_failed", "Starts again from what is committed")

# The sink (consumers/sink.py).

# Rows committed to the lake, by table.
SINK_ROWS = Counter("accrual_sink_rows", "Rows committed to the lake", ["table"])
# Records that became no row: raw events that the join dead-letters, and what nobody of ours wrote (`unreadable`).
SINK_SKIPPED = Counter("accrual_sink_skipped", "Records that became no row", ["topic", "reason"])
# Rows of ground truth that came again under another offset (the table `doubles`). Any at all: look for who wrote them.
SINK_DOUBLES = Counter("accrual_sink_double_rows", "Rows of ground truth that came twice", ["stream"])
# How far the lake is; beside the broker's end offsets, the sink's lag.
SINK_NEXT_OFFSET = Gauge("accrual_sink_next_offset", "First record not yet in the lake", ["topic", "partition"])
# From records in memory to the lake's commit.
SINK_BATCH_SECONDS = Histogram("accrual_sink_batch_seconds", "Duration of one batch")
# None for longer than a window should take: `accrual windows` says what the next one waits for.
SINK_WINDOWS_SEALED = Counter("accrual_sink_windows_sealed", "Windows sealed", ["stream"])
