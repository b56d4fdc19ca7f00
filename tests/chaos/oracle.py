"""The oracle: what must have come out, by a batch join in SQL over the two topics as read from offset 0.

It shares no code with the join or the audit: DuckDB parses the raw bytes, and the rules are those of docs/contract.md.
Because a partition is read in the order of its offsets, the row of every revision is known beforehand, not only that of
the last; open is only which of the first ones were skipped when a prediction came after its outcomes. What must hold:

    ground truth   each row is the oracle's row of that revision, none comes twice, the last revision is there, and the
                   revisions from the first that was emitted up to the last have no gap
    dead letters   the same multiset of (reason, topic, partition, offset), with the record's own key and value
    forwarded      every valid record in the wrong partition is in the right one, as often as it was in the wrong one
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import duckdb
import pyarrow as pa

SAMPLES = 5


class Record(NamedTuple):
    """A committed record of a topic, raw; `appended_ms` is the broker's clock when it came."""

    partition: int
    offset: int
    appended_ms: int
    key: bytes | None
    value: bytes | None


class Rules(NamedTuple):
    """What a stream's contract says, as far as the final row depends on it. `on_expiry` None: censored.

    `by_entity`: outcomes name an entity, and belong to its latest prediction before them, within the horizon.
    """

    horizon_s: float
    late: str
    on_expiry: str | None
    answers: tuple[str, ...] = ("yes", "no")
    max_ahead_s: float = 86_400
    by_entity: bool = False


class Verdict(NamedTuple):
    """How many rows, letters and forwarded records were compared, and what was found, by sort of failure."""

    compared: int
    found: Counter[str]
    samples: list[str]

    @property
    def clean(self) -> bool:
        """Nothing lost, nothing twice, nothing wrong."""
        return not self.found.total()


def judge(
    topics: Mapping[str, Iterable[Record]],
    rules: Mapping[str, Rules],
    homes: Mapping[bytes, int],
    prefix: str,
    database: Path | None = None,
) -> Verdict:
    """Compare what came out with what must have.

    `topics`: the records of `predictions`, `outcomes`, `ground_truth` and `dead_letters`. `homes`: the partition that
    each key belongs to. `prefix`: that of the topics' names in dead letters. `database`: a file that keeps all tables.
    """
    with duckdb.connect(str(database or ":memory:")) as db:
        _load(db, topics, rules, homes, prefix)
        db.execute(EVENTS)
        db.execute(EXPECTED)
        db.execute(EMITTED)
        db.execute(FINDINGS)
        counts = db.execute("SELECT failure, sum(times) FROM findings GROUP BY ALL").fetchall()
        samples = db.execute(
            "SELECT failure || ': ' || what || ': ' || subject FROM findings"
            f" QUALIFY row_number() OVER (PARTITION BY failure, what ORDER BY subject) <= {SAMPLES} ORDER BY ALL"
        ).fetchall()
        [compared] = db.execute(
            "SELECT (SELECT count(*) FROM expected_rows WHERE last) + (SELECT count(*) FROM expected_letters)"
            " + (SELECT count(*) FROM astray)"
        ).fetchall()
    return Verdict(compared[0], Counter({failure: int(times) for failure, times in counts}), [s for (s,) in samples])


def _load(
    db: duckdb.DuckDBPyConnection,
    topics: Mapping[str, Iterable[Record]],
    rules: Mapping[str, Rules],
    homes: Mapping[bytes, int],
    prefix: str,
) -> None:
    shape = pa.schema(
        [
            ("partition", pa.int32()),
            ("offset", pa.int64()),
            ("appended_ms", pa.int64()),
            ("key", pa.binary()),
            ("value", pa.binary()),
        ]
    )
    for topic, records in topics.items():
        rows = pa.Table.from_pylist([record._asdict() for record in records], shape)
        db.register("loading", rows)
        db.execute(f"CREATE TABLE raw_{topic} AS SELECT * FROM loading")
        db.unregister("loading")
    db.register(
        "loading", pa.table({"key": pa.array(homes, pa.binary()), "home": pa.array(homes.values(), pa.int32())})
    )
    db.execute("CREATE TABLE homes AS SELECT * FROM loading")
    db.execute(
        "CREATE TABLE rules (stream TEXT, horizon_s DOUBLE, late TEXT, on_expiry TEXT, answers TEXT[],"
        " max_ahead_s DOUBLE, by_entity BOOLEAN)"
    )
    db.executemany("INSERT INTO rules VALUES (?, ?, ?, ?, ?, ?, ?)", [(s, *map(_plain, r)) for s, r in rules.items()])
    db.execute("SET VARIABLE prefix = ?", [prefix])


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


# Every record of the input topics with the reason why it is no event (null: it is one), and its fields.
EVENTS = """
CREATE MACRO readable(value) AS try(decode(value));
CREATE MACRO document(value) AS CASE WHEN json_valid(readable(value)) THEN readable(value)::JSON END;
CREATE MACRO moment(doc, path) AS try_cast(json_extract_string(doc, path) AS TIMESTAMP);
CREATE MACRO texts(doc, paths) AS list_bool_and(list_transform(paths, lambda p: json_type(doc, p) IS NOT DISTINCT FROM
                                                                         'VARCHAR'));

CREATE TABLE events AS
WITH records AS (
    SELECT 'predictions' AS topic, *, document(value) AS doc, 'predicted_at' AS clock FROM raw_predictions
    UNION ALL
    SELECT 'outcomes', *, document(value), 'observed_at' FROM raw_outcomes
), fields AS (
    SELECT *,
           doc->>'$.prediction_id' AS id,
           doc->>'$.entity' AS entity,
           doc->>'$.stream' AS stream,
           moment(doc, '$.' || clock) AS happened_at,
           doc->>'$.model' AS model,
           doc->'$.inputs' AS inputs,
           doc->'$.output' AS output,
           doc->'$.values' AS outcome,
           coalesce(doc->>'$.source', 'outcome') AS source
    FROM records
)
SELECT f.*, homes.home, r.horizon_s, r.late, r.on_expiry, r.by_entity,
       CASE
         WHEN doc IS NULL THEN 'not_json'
         WHEN coalesce((doc->>'$.v')::INTEGER, 1) > 1 THEN 'unsupported_version'
         WHEN NOT texts(doc, [if(r.by_entity AND topic = 'outcomes', '$.entity', '$.prediction_id'), '$.stream',
                              '$.' || clock])
           OR happened_at IS NULL
           OR (topic = 'predictions' AND (NOT texts(doc, ['$.model']) OR inputs IS NULL OR output IS NULL))
           OR (topic = 'outcomes' AND outcome IS NULL) THEN 'invalid_event'
         WHEN r.stream IS NULL THEN 'unknown_stream'
         WHEN f.key IS DISTINCT FROM encode(coalesce(entity, id)) THEN 'invalid_id'
         WHEN epoch_ms(happened_at) > appended_ms + r.max_ahead_s * 1000 THEN 'time_out_of_range'
         WHEN topic = 'predictions' AND json_type(inputs, '$.x') NOT IN ('UBIGINT', 'BIGINT', 'DOUBLE')
         THEN 'invalid_inputs'
         WHEN topic = 'predictions' AND json_type(output, '$.probabilities') IS DISTINCT FROM 'OBJECT'
         THEN 'invalid_output'
         WHEN topic = 'outcomes' AND NOT list_contains(r.answers, outcome->>'$.answer') THEN 'invalid_values'
       END AS reason
FROM fields f LEFT JOIN homes USING (key) LEFT JOIN rules r USING (stream);

CREATE TABLE astray AS SELECT * FROM events WHERE reason IS NULL AND partition <> home;
CREATE TABLE arrived AS SELECT * FROM events WHERE reason IS NULL AND partition = home;
"""

EXPECTED = """
CREATE TABLE predicted AS
SELECT *, happened_at + to_microseconds((horizon_s * 1e6)::BIGINT) AS deadline
FROM arrived WHERE topic = 'predictions'
QUALIFY row_number() OVER (PARTITION BY stream, id ORDER BY "offset") = 1;

-- Distinct outcomes with their prediction's id; `place` is their order. Those of an entity are joined in the order of
-- their times, since whose they are is settled when event time has passed them.
CREATE TABLE observed AS
WITH contents AS (
    SELECT stream, id, entity, partition, happened_at, outcome, source, any_value(late) AS late,
           any_value(by_entity) AS by_entity, min("offset") AS "offset"
    FROM arrived WHERE topic = 'outcomes' GROUP BY ALL
)
SELECT *, "offset" AS place FROM contents WHERE NOT by_entity
UNION ALL BY NAME
SELECT c.* REPLACE (p.id AS id), row_number() OVER (ORDER BY c.happened_at, c.outcome::TEXT, c.source) AS place
FROM contents c LEFT JOIN predicted p
    ON p.stream = c.stream AND p.entity = c.entity AND c.happened_at BETWEEN p.happened_at AND p.deadline
WHERE c.by_entity
QUALIFY row_number() OVER (PARTITION BY c.partition, c."offset" ORDER BY p.happened_at DESC NULLS LAST, p.id DESC) = 1;

CREATE TABLE expected_letters AS
SELECT reason, topic, partition, "offset" FROM events WHERE reason IS NOT NULL
UNION ALL
SELECT 'conflicting_prediction', 'predictions', a.partition, a."offset"
FROM arrived a JOIN predicted p USING (stream, id)
WHERE a.topic = 'predictions'
  AND (a.happened_at, a.model, a.inputs, a.output) IS DISTINCT FROM (p.happened_at, p.model, p.inputs, p.output)
UNION ALL
SELECT 'late', 'outcomes', o.partition, o."offset"
FROM observed o JOIN predicted p USING (stream, id) WHERE o.late = 'dead_letter' AND o.happened_at > p.deadline
UNION ALL
SELECT 'orphan', 'outcomes', o.partition, o."offset"
FROM observed o ANTI JOIN predicted p USING (stream, id);

-- After the first k outcomes that count, revision k is the one of them that was observed last.
CREATE TABLE revisions AS
SELECT p.stream, p.id,
       row_number() OVER first_ones AS revision,
       max({happened_at: o.happened_at, outcome: o.outcome::TEXT, source: o.source}) OVER first_ones AS latest
FROM predicted p JOIN observed o USING (stream, id)
WHERE o.late = 'revise' OR o.happened_at <= p.deadline
WINDOW first_ones AS (PARTITION BY p.stream, p.id ORDER BY o.place ROWS UNBOUNDED PRECEDING);

CREATE TABLE expected_rows AS
WITH numbered AS (
    SELECT stream, id, 0 AS revision, NULL AS latest FROM predicted UNION ALL SELECT * FROM revisions
)
SELECT n.stream, n.id, n.revision,
       n.revision = max(n.revision) OVER (PARTITION BY n.stream, n.id)
           AND (n.revision > 0 OR p.deadline < (SELECT max(happened_at) FROM arrived)) AS last,
       {status: if(n.revision = 0, 'expired', 'labeled'),
        label: if(n.revision = 0, p.on_expiry, latest.outcome::JSON->>'$.answer'),
        model: p.model, predicted_at: p.happened_at, observed_at: latest.happened_at,
        inputs: p.inputs::TEXT, output: p.output::TEXT, outcome: latest.outcome, source: latest.source,
        partition: p.partition} AS content
FROM numbered n JOIN predicted p USING (stream, id);
"""

EMITTED = """
CREATE TABLE emitted_rows AS
WITH documents AS (SELECT *, document(value) AS doc FROM raw_ground_truth)
SELECT doc->>'$.stream' AS stream, doc->>'$.prediction_id' AS id, (doc->>'$.revision')::INTEGER AS revision,
       {status: doc->>'$.status', label: doc->>'$.label', model: doc->>'$.model',
        predicted_at: moment(doc, '$.predicted_at'), observed_at: moment(doc, '$.observed_at'),
        inputs: (doc->'$.inputs')::TEXT, output: (doc->'$.output')::TEXT,
        outcome: nullif((doc->'$.values')::TEXT, 'null'), source: doc->>'$.source', partition: partition} AS content
FROM documents;

CREATE TABLE emitted_letters AS
WITH documents AS (SELECT *, document(value) AS doc FROM raw_dead_letters)
SELECT doc->>'$.reason' AS reason,
       CASE doc->>'$.topic' WHEN getvariable('prefix') || '.predictions' THEN 'predictions'
                            WHEN getvariable('prefix') || '.outcomes' THEN 'outcomes' END AS topic,
       (doc->>'$.partition')::INTEGER AS partition, (doc->>'$.offset')::BIGINT AS "offset",
       from_base64(doc->>'$.key') AS key, from_base64(doc->>'$.value') AS value
FROM documents;
"""

FINDINGS = """
CREATE TABLE findings AS
WITH emitted AS (SELECT stream, id, revision, count(*) AS times FROM emitted_rows GROUP BY ALL),
spans AS (
    SELECT stream, id, min(revision) FILTER (revision > 0) AS first, count(*) FILTER (revision > 0) AS revisions,
           max(revision) AS last
    FROM emitted GROUP BY ALL
),
letters AS (SELECT reason, topic, partition, "offset", count(*) AS times FROM emitted_letters GROUP BY ALL),
wrongly AS (SELECT topic, key, value, count(*) AS times FROM astray GROUP BY ALL),
forwarded AS (
    SELECT w.topic, w.key, w.value, w.times AS wanted, count(a."offset") AS times
    FROM wrongly w LEFT JOIN arrived a ON (a.topic, a.key, a.value) = (w.topic, w.key, w.value) GROUP BY ALL
)
SELECT 'lost' AS failure, 'last row' AS what, format('{} {} revision {}', stream, id, revision) AS subject, 1 AS times
FROM expected_rows ANTI JOIN emitted USING (stream, id, revision) WHERE last
UNION ALL
SELECT 'lost', 'revisions between', format('{} {}: {} from {} to {}', stream, id, revisions, first, last),
       last - first + 1 - revisions
FROM spans WHERE revisions < last - first + 1
UNION ALL
SELECT 'duplicate', 'row', format('{} {} revision {}: {} times', stream, id, revision, times), times - 1
FROM emitted WHERE times > 1
UNION ALL
SELECT 'wrong', 'row',
       format('{} {} revision {}: {} instead of {}', g.stream, g.id, g.revision, g.content, e.content), 1
FROM emitted_rows g LEFT JOIN expected_rows e USING (stream, id, revision) WHERE g.content IS DISTINCT FROM e.content
UNION ALL
SELECT 'lost', 'dead letter', format('{} {} {} {}', reason, topic, partition, "offset"), 1
FROM expected_letters ANTI JOIN letters USING (reason, topic, partition, "offset")
UNION ALL
SELECT 'duplicate', 'dead letter', format('{} {} {} {}: {} times', reason, topic, partition, "offset", times), times - 1
FROM letters WHERE times > 1
UNION ALL
SELECT 'wrong', 'dead letter', format('{} {} {} {}', reason, topic, partition, "offset"), times
FROM letters ANTI JOIN expected_letters USING (reason, topic, partition, "offset")
UNION ALL
SELECT 'wrong', 'content of dead letter', format('{} {} {} {}', l.reason, l.topic, l.partition, l."offset"), 1
FROM emitted_letters l JOIN events e USING (topic, partition, "offset")
WHERE (l.key, l.value) IS DISTINCT FROM (e.key, e.value)
UNION ALL
SELECT 'lost', 'forwarded record', format('{} {}', topic, key), wanted - times FROM forwarded WHERE times < wanted
UNION ALL
SELECT 'duplicate', 'forwarded record', format('{} {}', topic, key), times - wanted FROM forwarded WHERE times > wanted;
"""
