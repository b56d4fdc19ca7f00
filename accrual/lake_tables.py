"""The tables of the lake: columns as Arrow schemas, from which DuckLake's own tables are made.

`partition`, `offset` and `arrived_at` (the broker's clock) say which Kafka record a row is; `day` is the UTC day of its
event time. `entity` is the business key of a stream that is joined by one (an outcome then has no `prediction_id`).
`inputs`, `output` and `values` are the JSON text that was sent; the view `ground_truth_<stream>`, which the
sink makes of the stream's contract, shows them typed (docs/decisions/0012).
"""

from __future__ import annotations

import pyarrow as pa

TIME = pa.timestamp("us", "UTC")

_POSITION = [("partition", pa.int32()), ("offset", pa.int64()), ("arrived_at", TIME)]
_GROUND_TRUTH = [
    ("stream", pa.string()),
    ("prediction_id", pa.string()),
    ("revision", pa.int32()),
    ("status", pa.string()),
    ("label", pa.string()),
    ("model", pa.string()),
    ("predicted_at", TIME),
    ("observed_at", TIME),
    ("inputs", pa.string()),
    ("output", pa.string()),
    ("values", pa.string()),
    ("source", pa.string()),
    ("entity", pa.string()),
    ("day", pa.date32()),
    *_POSITION,
]

TABLES: dict[str, pa.Schema] = {
    # The capture log: every valid record of the predictions topic, duplicates too.
    "predictions": pa.schema(
        [
            ("stream", pa.string()),
            ("prediction_id", pa.string()),
            ("model", pa.string()),
            ("predicted_at", TIME),
            ("inputs", pa.string()),
            ("output", pa.string()),
            ("entity", pa.string()),
            ("day", pa.date32()),
            *_POSITION,
        ]
    ),
    # The capture log of outcomes: every valid record.
    "outcomes": pa.schema(
        [
            ("stream", pa.string()),
            ("prediction_id", pa.string()),
            ("observed_at", TIME),
            ("values", pa.string()),
            ("source", pa.string()),
            ("entity", pa.string()),
            ("day", pa.date32()),
            *_POSITION,
        ]
    ),
    # How far event time of a silent stream has come in a partition: records of the predictions topic.
    "ticks": pa.schema([("stream", pa.string()), ("moment", TIME), *_POSITION]),
    # Every row the join ever emitted; the view `ground_truth` shows the current one of each prediction.
    "ground_truth_history": pa.schema(_GROUND_TRUTH),
    # Rows of ground truth that came again under another offset: kept out of `ground_truth_history`, never dropped.
    # `first_offset` is the one that counts; `why` says whether they are equal.
    "doubles": pa.schema([*_GROUND_TRUTH, ("first_offset", pa.int64()), ("why", pa.string())]),
    # Events that broke their contract; topic, partition and offset are those of the original record.
    "dead_letters": pa.schema(
        [
            ("reason", pa.string()),
            ("detail", pa.string()),
            ("topic", pa.string()),
            ("partition", pa.int32()),
            ("offset", pa.int64()),
            ("key", pa.binary()),
            ("value", pa.binary()),
            ("stream", pa.string()),
            ("prediction_id", pa.string()),
            ("arrived_at", TIME),
        ]
    ),
    # The next three hold the structs of accrual.ledger, field by field; what is nested is JSON text.
    "generations": pa.schema(
        [
            ("stream", pa.string()),
            ("version", pa.int32()),
            ("model", pa.string()),
            ("digest", pa.string()),
            ("bundle", pa.string()),
            ("run_id", pa.string()),
            ("parent", pa.string()),
            ("windows", pa.list_(pa.int32())),
            ("rows", pa.int64()),
            ("published_at", TIME),
            ("learned_until", TIME),
            ("offset", pa.int64()),
        ]
    ),
    "runs": pa.schema(
        [
            ("run_id", pa.string()),
            ("stream", pa.string()),
            ("version", pa.int32()),
            ("parent", pa.string()),
            ("windows", pa.list_(pa.int32())),
            ("snapshot_id", pa.int64()),
            ("rows_new", pa.int64()),
            ("rows_replayed", pa.int64()),
            ("seed", pa.int64()),
            ("digest", pa.string()),
            ("state", pa.string()),
            ("reason", pa.string()),
            ("seconds", pa.float64()),
            ("cpu_seconds", pa.float64()),
            ("retention", pa.float64()),
            ("at", TIME),
            ("trigger", pa.string()),
            ("selection", pa.map_(pa.string(), pa.int64())),
            ("learned_until", TIME),
            ("offset", pa.int64()),
        ]
    ),
    "evaluations": pa.schema(
        [
            ("stream", pa.string()),
            ("run_id", pa.string()),
            ("window", pa.int32()),
            ("model", pa.string()),
            ("role", pa.string()),
            ("rows", pa.int64()),
            ("accuracy", pa.float64()),
            ("auroc", pa.float64()),
            ("brier", pa.float64()),
            ("log_loss", pa.float64()),
            ("ece", pa.float64()),
            ("coverage", pa.float64()),
            ("calibration_error", pa.float64()),
            ("rank_correlation", pa.float64()),
            ("outside", pa.int64()),
            ("intervals", pa.string()),
            ("reliability", pa.string()),
            ("slices", pa.string()),
            ("e_value", pa.float64()),
            ("verdict", pa.string()),
            ("at", TIME),
            ("offset", pa.int64()),
        ]
    ),
    # Sealed windows: the cohort of predictions with from_time <= predicted_at < to_time, as they were at `snapshot_id`.
    # `rows` counts its predictions, `labeled` those with a label, `coverage` is their ratio; `trainable` counts those
    # with a label that are not in quarantine. `maturity` is the share of the labels to come that were expected to be
    # there, `reached` the next offset of each partition of ground truth.
    "windows": pa.schema(
        [
            ("stream", pa.string()),
            ("window", pa.int32()),
            ("snapshot_id", pa.int64()),
            ("from_time", TIME),
            ("to_time", TIME),
            ("rows", pa.int32()),
            ("labeled", pa.int32()),
            ("trainable", pa.int32()),
            ("coverage", pa.float64()),
            ("maturity", pa.float64()),
            ("digest", pa.string()),
            ("reached", pa.list_(pa.int64())),
            ("sealed_at", TIME),
        ]
    ),
    # Why rows are not trained on: put here when their window is checked, then what people decided (Decision of
    # accrual.ledger; `offset` is its record's, and -1 for the check). The view `quarantined` has the current state.
    "quarantine": pa.schema(
        [
            ("stream", pa.string()),
            ("window", pa.int32()),
            ("prediction_id", pa.string()),
            ("revision", pa.int32()),
            ("rule", pa.string()),
            ("detail", pa.string()),
            ("state", pa.string()),
            ("by", pa.string()),
            ("note", pa.string()),
            ("at", TIME),
            ("offset", pa.int64()),
        ]
    ),
    # What was measured of a window when it was checked; docs/quality.md has the metrics. `part`: of a field, the slice.
    "quality": pa.schema(
        [
            ("stream", pa.string()),
            ("window", pa.int32()),
            ("metric", pa.string()),
            ("field", pa.string()),
            ("part", pa.string()),
            ("value", pa.float64()),
            ("bound", pa.string()),
            ("verdict", pa.string()),
            ("at", TIME),
        ]
    ),
    # Ranges of offsets in the topics of raw events that hold no record: the broker's transaction markers.
    "markers": pa.schema(
        [
            ("topic", pa.string()),
            ("partition", pa.int32()),
            ("first_offset", pa.int64()),
            ("next_offset", pa.int64()),
        ]
    ),
    # What the Parquet files were when they were new: `path` is below the data folder, `ranges` is JSON, the offsets
    # whose rows a file holds (accrual.lake_verify).
    "files": pa.schema(
        [
            ("path", pa.string()),
            ("bytes", pa.int64()),
            ("sha256", pa.string()),
            ("ranges", pa.string()),
            ("recorded_at", TIME),
        ]
    ),
    # Steps of the sinks: a row says that the records of a topic-partition from first_offset up to, not including,
    # next_offset are taken. A claim puts those of each together. The view `offsets` has one row for each.
    "moves": pa.schema(
        [
            ("topic", pa.string()),
            ("partition", pa.int32()),
            ("first_offset", pa.int64()),
            ("next_offset", pa.int64()),
        ]
    ),
    # Rows that `accrual erase` removed, one for each, without what they said: `subject` and `prediction` are keyed
    # digests, `topic` is there if the row was a record of raw events, `moment` if none of its partition was later.
    "erasures": pa.schema(
        [
            ("erasure", pa.string()),
            ("stream", pa.string()),
            ("table", pa.string()),
            ("day", pa.date32()),
            ("topic", pa.string()),
            ("partition", pa.int32()),
            ("offset", pa.int64()),
            ("moment", TIME),
            ("window", pa.int32()),
            ("prediction", pa.string()),
            ("subject", pa.string()),
            ("at", TIME),
        ]
    ),
    # Which open lake may make moves on a topic-partition: the one that claimed it last.
    "owners": pa.schema([("topic", pa.string()), ("partition", pa.int32()), ("owner", pa.string())]),
}
# Kept in the catalog, not in files: a few rows that every commit reads and adds to, what is known of the files, and
# what no topic could give again if a file was lost.
INLINED = ("moves", "owners", "files", "windows", "doubles")
# A claim rewrites all moves, and whoever adds to them meanwhile conflicts with it: so there is always one to rewrite.
FIRST_MOVE = {"topic": "", "partition": 0, "first_offset": 0, "next_offset": 0}

# The keys of their data files: a predicate on `stream`, and one on `day` or the event time, leaves out the other files.
PARTITIONED = dict.fromkeys(("predictions", "outcomes", "ground_truth_history"), "stream, day")

VIEWS: dict[str, str] = {
    # All rows of a prediction have the same time: it is in the key so that a predicate on it prunes files.
    "ground_truth": """
        select * from ground_truth_history
        qualify row_number() over (
            partition by stream, prediction_id, predicted_at, day order by revision desc, "offset"
        ) = 1
    """,
    # The last decision holds. No offset is null: DuckDB 1.5.5 then gives the wrong row of this query now and then.
    "quarantined": """
        select * from quarantine
        qualify row_number() over (partition by stream, prediction_id, rule order by "offset" desc) = 1
    """,
    # One row per topic-partition: the sinks have taken the records from first_offset up to, not including, next_offset.
    "offsets": """
        select topic, "partition", min(first_offset) as first_offset, max(next_offset) as next_offset
        from moves where topic <> '' group by all
    """,
    # Rows of sealed windows, each with the window it belongs to; those that came after it was sealed are `later`.
    "sealed_rows": """
        select w."window", w.snapshot_id, w.digest, h.*,
            h."offset" >= coalesce(w.reached[h."partition" + 1], 0) as later
        from windows w join ground_truth_history h
            on h.stream = w.stream and h.predicted_at >= w.from_time and h.predicted_at < w.to_time
    """,
    # Predictions of sealed windows whose ground truth has changed since, with the label that was sealed and today's.
    "touched": """
        select stream, "window", prediction_id, arg_max(label, revision) filter (not later) as sealed_label,
            arg_max(label, revision) as label, min(arrived_at) filter (later) as touched_at
        from sealed_rows group by stream, "window", prediction_id having bool_or(later)
    """,
}


def view_of(stream: str) -> str:
    """The name of a stream's view, `ground_truth_<stream>`: an identifier that needs no quotes."""
    return f"ground_truth_{stream.replace('-', '_')}"
