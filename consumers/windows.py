"""Windows: cohorts of predictions that are old enough for their labels to be known, sealed one after another.

Window k of a stream is the ground truth with `from_time <= predicted_at < to_time`; it begins where window k-1 ends and
ends where it has the contract's `window_rows` labels. It is sealed, never to change again, when

1. its youngest prediction is older than the horizon: event time has passed `to_time` by it (what arrived early is
   biased; a cohort that has matured is not). With `training.maturity` below 1 it is old enough when that share of the
   labels of such predictions has come, as measured (`consumers/maturity.py`),
2. no prediction of it is pending (with `training.maturity` below 1 some may be: `coverage` says it),
3. the join recomputed from the raw events finds the same ground truth for it, and
4. it is within the bounds of the contract's `quality` (`consumers/quality.py`). Rows that break its rules are in
   quarantine before the window's snapshot is taken.

Whoever reads the lake at the window's `snapshot_id` sees exactly the rows that were sealed; `digest` proves it. What
comes for it later is in the view `touched`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from accrual.contract import Contract
from accrual.errors import LakeConflict, LakeError
from accrual.kafka import TopicNames
from accrual.lake import Lake, Move, WritableLake
from accrual.lake_tables import TABLES
from accrual.watermark import watermark_of
from consumers.maturity import delay_curve
from consumers.quality import Report, inspect, unrecorded
from consumers.recompute import EARLIEST, Scope, recompute

# A check waits at least this long after the last one, and ten times as long as that one took.
_PAUSE_S = 1.0
_PAUSE_FACTOR = 10.0

# Over the rows of a window, of which there is one for each prediction.
DIGEST = """sha256(string_agg(concat_ws('|', prediction_id, revision, coalesce(label, '')), chr(10)
    order by prediction_id))"""

log = logging.getLogger("accrual.sink")


class Candidate(msgspec.Struct, frozen=True):
    """The next window of a stream, as far as it is known.

    `labels` of `needed`; `until` once there are enough. `mature_at`: how far event time (`watermark`) must come.
    `pending` and `differences` are counted once it has come that far, None before; `quality` is looked at once neither
    holds the window back, where the contract has any. `maturity`: see `Training`.
    """

    stream: str
    window: int
    since: datetime
    until: datetime | None
    labels: int
    needed: int
    watermark: datetime | None
    maturity: float = 1.0
    mature_at: datetime | None = None
    pending: int | None = None
    differences: int | None = None
    quality: Report | None = None

    @property
    def complete(self) -> bool:
        """Whether it can be sealed."""
        clean = self.quality is None or not self.quality.failed
        return self.pending is not None and not self._held_back and self.differences == 0 and clean

    @property
    def _held_back(self) -> bool:
        """By a prediction whose label may still come."""
        return self.maturity == 1 and bool(self.pending)

    @property
    def waits_for(self) -> str:
        """What is missing, for a person."""
        if self.until is None or self.mature_at is None:
            return f"labels: {self.labels} of more than {self.needed}"
        if self.pending is None:
            now = "none" if self.watermark is None else f"{self.watermark:%Y-%m-%d %H:%M}"
            return f"maturity: event time {self.mature_at:%Y-%m-%d %H:%M}, now {now}"
        if self._held_back:
            return f"{self.pending} pending predictions"
        if self.differences:
            return f"{self.differences} differences to the recomputation: see accrual audit"
        if self.quality is not None and self.quality.failed:
            return "quality: " + "; ".join(finding.said for finding in self.quality.failed)
        return "the sink to seal it"


def next_window(
    lake: Lake, contracts: Mapping[str, Contract], names: TopicNames, stream: str, watermark: datetime | None
) -> Candidate:
    """The window after the last sealed one; the costly checks only once it is mature."""
    contract = contracts[stream]
    last = lake.rows('select max("window") as k, max(to_time) as t from windows where stream = ?', [stream])[0]
    since = last["t"] or EARLIEST
    needed = contract.training.window_rows
    found = lake.rows(
        """
        with labeled as (
            select distinct prediction_id, predicted_at from ground_truth_history
            where stream = ? and predicted_at >= ? and label is not null
        )
        select (select count(*) from labeled) as labels, min(predicted_at) as until from labeled
        where predicted_at > (select predicted_at from labeled order by predicted_at limit 1 offset ?)
        """,
        [stream, since, needed - 1],
    )[0]
    candidate = Candidate(
        stream=stream,
        window=(last["k"] or 0) + 1,
        since=since,
        until=found["until"],
        labels=found["labels"],
        needed=needed,
        watermark=watermark,
        maturity=contract.training.maturity,
    )
    until = candidate.until
    if until is None:
        return candidate
    age_us = contract.horizon_us
    if candidate.maturity < 1 and watermark is not None:
        age_us = delay_curve(lake, contract, watermark).age_us(candidate.maturity)
    mature_at = until + timedelta(microseconds=age_us)
    candidate = msgspec.structs.replace(candidate, mature_at=mature_at)
    if watermark is None or watermark < mature_at:
        return candidate
    recompute(lake, contracts, names, Scope(stream, since, until))
    checked = lake.rows(
        """
        select (select count(*) from compared where predicted and not known) as pending,
               (select count(*) from differences) as differences
        """
    )[0]
    candidate = msgspec.structs.replace(candidate, **checked)
    if contract.quality is None or not candidate.complete:
        return candidate
    report = inspect(lake, contract, candidate.window, since, until)
    return msgspec.structs.replace(candidate, quality=report)


class Sealer:
    """Seals windows as they become complete. It looks into the lake only when a batch brought what was missing.

    Where others write too, their batches are not seen here: it looks whenever the pause after the last look is over.
    """

    def __init__(self, lake: WritableLake, contracts: Mapping[str, Contract], names: TopicNames) -> None:
        self._lake = lake
        self._contracts = contracts
        self._names = names
        self._watermarks = {name: watermark_of(lake, contract) for name, contract in contracts.items()}
        self._news: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        # Per stream, what to wait for: so many labels, an event time, any news.
        self._waiting: dict[str, tuple[int, datetime, int]] = {}
        self._not_before = 0.0
        self._noted = False

    def look_at(self, tables: Mapping[str, pa.Table]) -> None:
        """Note what a committed batch brought."""
        for table, rows in tables.items():
            if "stream" not in rows.column_names:
                continue
            moment = {"predictions": "predicted_at", "outcomes": "observed_at", "ticks": "moment"}.get(table)
            for entry in rows.select(["stream"]).group_by("stream").aggregate([([], "count_all")]).to_pylist():
                stream = entry["stream"]
                self._news[stream] += entry["count_all"]
                if table == "ground_truth_history":
                    self._labels[stream] += entry["count_all"]
                if moment and stream in self._contracts:
                    reached = pc.max(rows.filter(pc.equal(rows["stream"], stream))[moment]).as_py()
                    reached -= timedelta(microseconds=self._contracts[stream].disorder_us)
                    self._watermarks[stream] = max(reached, self._watermarks[stream] or reached)

    def seal(self, guard: Move) -> list[dict[str, Any]]:
        """Seal the next window of each stream if it is complete; returns the rows of the table `windows`.

        `guard` is a move to where this sink is already: whoever can make it is the one that seals.
        It often has nothing to do. A check that fails in the lake's engine is left for later: capture goes on.
        """
        due = [stream for stream in self._contracts if self._is_due(stream)]
        if not due or time.monotonic() < self._not_before:
            return []
        started = time.monotonic()
        sealed, self._noted = [], False
        for stream in due:
            try:
                with self._lake.transaction():
                    window = self._seal_next(stream, guard)
                if window:
                    sealed.append(window)
            except LakeConflict as exc:
                log.info("the next window of %s is left for later: %s", stream, exc)
            except LakeError:
                log.exception("the next window of %s cannot be checked", stream)
        if not sealed and not self._noted:
            self._not_before = time.monotonic() + max(_PAUSE_S, _PAUSE_FACTOR * (time.monotonic() - started))
        return sealed

    def _is_due(self, stream: str) -> bool:
        if not self._lake.alone:
            return True
        labels, watermark, news = self._waiting.get(stream, (0, EARLIEST, 0))
        reached = self._watermarks[stream]
        return (
            self._labels[stream] >= labels
            and self._news[stream] >= news
            and reached is not None
            and reached >= watermark
        )

    def _seal_next(self, stream: str, guard: Move) -> dict[str, Any] | None:
        snapshot = self._lake.snapshot_id()
        if not self._lake.alone:
            self._watermarks[stream] = watermark_of(self._lake, self._contracts[stream])
        candidate = next_window(self._lake, self._contracts, self._names, stream, self._watermarks[stream])
        news = unrecorded(self._lake, candidate.quality) if candidate.quality else {}
        if "quarantine" in news or (news and not candidate.complete):
            # In a transaction of its own: the snapshot that a window is sealed at shows what is in quarantine.
            self._noted = self._lake.add(news, [guard]) or self._noted
            return None
        if not candidate.complete:
            self._wait(candidate)
            return None
        window = self._lake.rows(
            f"""
            with cohort as (
                select prediction_id, revision, label from ground_truth
                where stream = ? and predicted_at >= ? and predicted_at < ?
            ),
            everyone as (select count(*) as predictions from compared where predicted)
            select any_value(predictions) as rows, count(label) as labeled,
                count(label) filter (prediction_id not in (
                    select prediction_id from quarantined where stream = ? and state <> 'released')) as trainable,
                count(label) / any_value(predictions) as coverage, {DIGEST} as digest
            from cohort, everyone
            """,
            [stream, candidate.since, candidate.until, stream],
        )[0]
        reached = self._lake.rows(
            'select list(next_offset order by "partition") as reached from offsets where topic = ?',
            [self._names.ground_truth],
        )[0]
        window |= reached | {
            "stream": stream,
            "window": candidate.window,
            "snapshot_id": snapshot,
            "from_time": candidate.since,
            "to_time": candidate.until,
            "maturity": candidate.maturity,
            "sealed_at": datetime.now(UTC),
        }
        rows = {"windows": pa.Table.from_pylist([window], TABLES["windows"]), **news}
        return window if self._lake.add(rows, [guard]) else None

    def _wait(self, candidate: Candidate) -> None:
        """Look again when what this candidate lacks can have come."""
        stream = candidate.stream
        labels, watermark, news = 0, EARLIEST, self._news[stream] + 1
        if candidate.until is None:
            labels = self._labels[stream] + max(1, candidate.needed - candidate.labels)
        elif candidate.pending is None and candidate.mature_at:
            watermark, news = candidate.mature_at, 0
        self._waiting[stream] = (labels, watermark, news)
