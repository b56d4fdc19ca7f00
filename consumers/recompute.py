"""The join a second time, in SQL over the raw events in the lake: what `streams` should have made of them.

It shares nothing with `streams/join.py` but the contracts' text. It works on temporary tables, in this order:

    terms, translations, homes   the contracts, and the right partition of ids that were written to several
    accepted_predictions, accepted_outcomes   the rows of the lake without those that the join refused
    joinable_outcomes   the outcomes by prediction: those that name an entity under the predictions they belong to
    scoped_predictions, scoped_outcomes, scoped_ground_truth_history   of these, the ones to look at
    captured      every prediction record: first, duplicate, conflicting, forwarded, too_old or reused
    evidence      every distinct outcome of those predictions, with whether it counts
    said          what each outcome that counts says by itself
    expected      per prediction: how many outcomes count, what they say together, and which one decides
    compared      `expected` beside the current ground truth
    differences   where the two are not the same: stream, prediction_id, kind, detail
    excused       but rightly so: outcomes that came after the join had forgotten their prediction

A prediction's content is compared by a 64-bit hash; everything else by value.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from operator import itemgetter

import msgspec
import pyarrow as pa

from accrual.contract import CENSORED, Contract
from accrual.expression import Node
from accrual.kafka import TopicNames, partition_of
from accrual.lake import Lake
from consumers import recompute_queries as queries
from consumers.expression_sql import label_sql, quoted

EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
LATEST = datetime(9999, 1, 1, tzinfo=UTC)


class Scope(msgspec.Struct, frozen=True):
    """Which predictions: those of `stream` (all if None) with since <= predicted_at < until.

    `changed_since`: of these, only those of which something came after that snapshot of the lake.
    """

    stream: str | None = None
    since: datetime = EARLIEST
    until: datetime = LATEST
    changed_since: int | None = None

    @property
    def condition(self) -> str:
        """The scope in SQL, for any table of events: by id where time is limited, since outcomes have another time."""
        if (self.since, self.until) != (EARLIEST, LATEST) or self.changed_since is not None:
            return "(stream, prediction_id) in (from ids)"
        return "true" if self.stream is None else "stream = (select any_value(stream) from ids)"


def recompute(lake: Lake, contracts: Mapping[str, Contract], names: TopicNames, scope: Scope) -> None:
    """Make the temporary tables for the predictions in scope. Use one snapshot: a pinned lake, or a transaction.

    Raises LakeError if the lake no longer has the snapshot `scope.changed_since`.
    """
    with lake.with_tables({"contract_terms": _terms(contracts), "contract_map": _translations(contracts)}):
        lake.rows("create or replace temp table terms as from contract_terms")
        lake.rows("create or replace temp table translations as from contract_map")
    for table, topic in (("predictions", names.predictions), ("outcomes", names.outcomes)):
        lake.rows(f"create or replace temp table refused_{table} as {queries.REFUSED}", [topic])
        lake.rows(
            f"create or replace temp view accepted_{table} as"
            f' from lake.{table} anti join refused_{table} using ("partition", "offset")'
        )
    outcomes = "accepted_outcomes"
    if any(contract.join is not None for contract in contracts.values()):
        lake.rows(queries.JOINABLE_OUTCOMES, [names.predictions])
        outcomes = "joinable_outcomes"
    lake.rows(
        """
        create or replace temp table ids as
        select distinct stream, prediction_id from accepted_predictions
        where (?::varchar is null or stream = ?) and predicted_at >= ? and predicted_at < ?
        """,
        [scope.stream, scope.stream, scope.since, scope.until],
    )
    if scope.changed_since is not None:
        _keep_changed(lake, names, scope, outcomes)
    scoped = {
        "predictions": "accepted_predictions",
        "outcomes": outcomes,
        "ground_truth_history": "ground_truth_history",
    }
    for name, table in scoped.items():
        lake.rows(f"create or replace temp view scoped_{name} as from {table} where {scope.condition}")
    _find_homes(lake, names)
    lake.rows(queries.CAPTURED, [names.predictions, scope.since, scope.until])
    lake.rows(queries.PASSAGE)
    if _some(lake, "captured where kind = 'conflicting' and letter is null"):
        lake.rows(queries.REUSED)
    lake.rows(queries.EVIDENCE, [names.outcomes])
    lake.rows(queries.SAID)
    for contract in contracts.values():
        if contract.expression is not None:
            lake.rows(_said_by_expression(contract, contract.expression), [contract.stream])
    lake.rows(queries.EXPECTED)
    changed = "true" if scope.changed_since is None else "(stream, prediction_id) in (from ids)"
    lake.rows(queries.COMPARED.format(changed=changed), [scope.stream, scope.stream, scope.since, scope.until])
    lake.rows(queries.DIFFERENCES)
    lake.rows("create or replace temp table excused (stream varchar, prediction_id varchar, outcomes bigint)")
    if _some(lake, "differences"):
        lake.rows(queries.EXCUSED)
        lake.rows(
            "delete from differences where (stream, prediction_id) in (select stream, prediction_id from excused)"
        )


def _keep_changed(lake: Lake, names: TopicNames, scope: Scope, outcomes: str) -> None:
    """Of `ids`, keep those of which a table has a row that came later; and add ground truth that nothing predicted."""
    before = lake.rows(
        f"select topic, partition, max(next_offset) as reached from lake.moves at (version => {scope.changed_since})"
        " where topic in (?, ?, ?) group by all",
        [names.predictions, names.outcomes, names.ground_truth],
    )
    reached = pa.Table.from_pylist(
        before, pa.schema([("topic", pa.string()), ("partition", pa.int32()), ("reached", pa.int64())])
    )
    tables = {
        "accepted_predictions": names.predictions,
        outcomes: names.outcomes,
        "ground_truth_history": names.ground_truth,
    }
    later = " union ".join(
        f"select stream, prediction_id from {table} t left join there b"
        f" on b.topic = {quoted(topic)} and b.partition = t.partition where t.offset >= coalesce(b.reached, 0)"
        for table, topic in tables.items()
    )
    with lake.with_tables({"there": reached}):
        lake.rows(f"create or replace temp table changed as {later}")
    lake.rows(
        """
        create or replace temp table ids as
        from ids semi join changed using (stream, prediction_id)
        union
        select distinct stream, prediction_id
        from ground_truth_history h semi join changed using (stream, prediction_id)
        where (?::varchar is null or stream = ?) and predicted_at >= ? and predicted_at < ?
        """,
        [scope.stream, scope.stream, scope.since, scope.until],
    )


def _some(lake: Lake, what: str) -> bool:
    return bool(lake.rows(f"select 1 from {what} limit 1"))


def _terms(contracts: Mapping[str, Contract]) -> pa.Table:
    """What of each contract decides the ground truth."""
    rows = [
        {
            "stream": name,
            "horizon_us": c.horizon_us,
            "remember_us": c.remember_us,
            "disorder_us": c.disorder_us,
            "late": c.late,
            "join_to": c.join.to if c.join else None,
            "expired_label": None if c.on_expiry == CENSORED else c.on_expiry,
            "field": c.label.field,
            "field_type": c.outcome.values[c.label.field].type if c.label.field else None,
            "mapped": c.label.map is not None,
            "take": c.label.take,
            "complete_when": c.label.complete_when,
            "sources": c.label.sources,
            "thresholds": sorted(
                ({"floor": floor, "label": label} for label, floor in (c.label.thresholds or {}).items()),
                key=itemgetter("floor"),
                reverse=True,
            ),
        }
        for name, c in contracts.items()
    ]
    texts = ("stream", "late", "join_to", "expired_label", "field", "field_type", "take")
    types = {
        **{name: pa.string() for name in texts},
        **{name: pa.int64() for name in ("horizon_us", "remember_us", "disorder_us", "complete_when")},
        "mapped": pa.bool_(),
        "sources": pa.list_(pa.string()),
        "thresholds": pa.list_(pa.struct({"floor": pa.float64(), "label": pa.string()})),
    }
    return pa.Table.from_pylist(rows, pa.schema(types))


def _said_by_expression(contract: Contract, expression: Node) -> str:
    """The statement that computes a contract's expression for its outcomes."""
    columns = {name: f'"text {number}"' for number, name in enumerate(contract.outcome.values)}
    texts = [f"texts[list_position(keys, {quoted(name)})] as {column}" for name, column in columns.items()]
    return queries.SAID_BY_EXPRESSION.format(columns=", ".join(texts), says=label_sql(expression, columns.__getitem__))


def _translations(contracts: Mapping[str, Contract]) -> pa.Table:
    rows = [
        {"stream": name, "value": value, "label": label}
        for name, c in contracts.items()
        for value, label in (c.label.map or {}).items()
    ]
    return pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in ("stream", "value", "label")]))


def _find_homes(lake: Lake, names: TopicNames) -> None:
    """Keys that were written to several partitions (a producer with another partitioner; the join forwards those)."""
    strays = lake.rows(
        """
        select "key" from (
            select coalesce(entity, prediction_id) as "key", partition from scoped_predictions
            union all select coalesce(entity, prediction_id), partition from scoped_outcomes
        ) group by "key" having min(partition) <> max(partition)
        """
    )
    partitions = lake.rows("select count(*) as n from offsets where topic = ?", [names.predictions])[0]["n"]
    homes = pa.table(
        {
            "key": pa.array([row["key"] for row in strays], pa.string()),
            "home": pa.array([partition_of(row["key"].encode(), partitions) for row in strays], pa.int32()),
        }
    )
    with lake.with_tables({"found": homes}):
        lake.rows("create or replace temp table homes as from found")
