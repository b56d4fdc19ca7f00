"""Every metric of the stages, in one list; Prometheus's default registry.

Needs prometheus_client, which the stages install: `import accrual` does not load this.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

# The join worker (streams/loop.py).

# Events by what became of them: labeled and expired rows, duplicate_prediction, duplicate_outcome, late_outcome
# (observed after the horizon, in a stream that only counts those), forwarded (came in a wrong partition).
JOIN_EVENTS = Counter("accrual_join_events", "What became of events", ["became"])
# Dead letters by reason (accrual.events.REASONS). A rise means that some producer breaks its contract.
JOIN_DEAD_LETTERS = Counter("accrual_join_dead_letters", "Events that broke their contract", ["reason"])
# Records on the broker that this worker has not joined yet. A lasting rise: add a worker.
JOIN_LAG = Gauge("accrual_join_lag_records", "Records not joined yet")
# From the join's result to its commit by the broker.
JOIN_COMMIT_SECONDS = Histogram("accrual_join_commit_seconds", "Duration of one Kafka transaction")
# Times the worker started again from what is committed: the broker was away, a transaction failed.
JOIN_SESSIONS_FAILED = Counter("accrual_join_sessions_failed", "Starts again from what is committed")

# The sink (consumers/sink.py).

# Rows committed to the lake, by table.
SINK_ROWS = Counter("accrual_sink_rows", "Rows committed to the lake", ["table"])
# Records that became no row: raw events that the join dead-letters, and what nobody of ours wrote (`unreadable`).
SINK_SKIPPED = Counter("accrual_sink_skipped", "Records that became no row", ["topic", "reason"])
# How far the lake is; beside the broker's end offsets, the sink's lag.
SINK_NEXT_OFFSET = Gauge("accrual_sink_next_offset", "First record not yet in the lake", ["topic", "partition"])
# From records in memory to the lake's commit.
SINK_BATCH_SECONDS = Histogram("accrual_sink_batch_seconds", "Duration of one batch")
# None for longer than a window should take: `accrual windows` says what the next one waits for.
SINK_WINDOWS_SEALED = Counter("accrual_sink_windows_sealed", "Windows sealed", ["stream"])
