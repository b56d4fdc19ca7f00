"""The audit: do the books balance?

Five questions, the first four answered in SQL over the lake alone:

- Does the join, recomputed from the raw events (`recompute`), find the same ground truth, prediction by prediction?
- Is every captured event accounted for? Per stream and day
      captured = labeled + expired + pending + dead-lettered + duplicate + erased,
  and per stream, of outcomes,
      captured = in labels + incomplete + duplicate + late + orphaned + waiting + dead-lettered + erased.
- Was every record captured? Per topic-partition, rows and dead letters cover the offsets read, without gap or overlap.
- Are the sealed windows as they were sealed? Their digests are computed again (what came later is not part of them).
- Are the files those that were written? Their digests too, when everything is audited.

A stage that lags looks like a difference (an outcome is there, its label is not yet): wait, or look again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import date

import msgspec

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import LakeUnavailable
from accrual.kafka import TopicNames
from accrual.lake import Lake, open_lake
from accrual.lake_verify import DAMAGED, data_files, verify
from consumers import audit_queries as queries
from consumers.recompute import Scope, recompute
from consumers.windows import DIGEST


class Balance(msgspec.Struct, frozen=True):
    """The predictions of a stream and day (of prediction; of arrival for those that could not be read).

    `duplicate` includes records that were forwarded to their partition, and ids used again after the join forgot them.
    """

    stream: str
    day: date
    captured: int
    labeled: int
    expired: int
    pending: int
    dead_lettered: int
    duplicate: int
    erased: int = 0

    @property
    def unaccounted(self) -> int:
        """Zero if the books balance."""
        return self.captured - (
            self.labeled + self.expired + self.pending + self.dead_lettered + self.duplicate + self.erased
        )


class OutcomeBalance(msgspec.Struct, frozen=True):
    """The outcomes of a stream. `late` includes those that came after their prediction was forgotten.

    `incomplete` ones count, but are too few for a label. `waiting` ones have no prediction yet.
    """

    stream: str
    captured: int
    in_labels: int
    incomplete: int
    duplicate: int
    late: int
    orphaned: int
    waiting: int
    dead_lettered: int
    erased: int = 0

    @property
    def unaccounted(self) -> int:
        """Zero if the books balance."""
        return self.captured - (
            self.in_labels
            + self.incomplete
            + self.duplicate
            + self.late
            + self.orphaned
            + self.waiting
            + self.dead_lettered
            + self.erased
        )


class Coverage(msgspec.Struct, frozen=True):
    """A topic-partition of raw events: offsets read, and what of them is in the lake."""

    topic: str
    partition: int
    first_offset: int
    next_offset: int
    rows: int
    dead_letters: int
    markers: int
    missing: int
    twice: int


class Difference(msgspec.Struct, frozen=True):
    """Something that is not as it should be; `id` is a prediction, or `topic[partition]@offset`."""

    stream: str | None
    id: str
    kind: str
    detail: str


class Audit(msgspec.Struct, frozen=True):
    """What the audit of one snapshot found."""

    snapshot_id: int
    balances: list[Balance]
    outcomes: list[OutcomeBalance]
    coverage: list[Coverage]
    differences: list[Difference]
    seconds: float

    @property
    def balanced(self) -> bool:
        """Whether nothing is missing, double, different or unaccounted for."""
        unaccounted = [b.unaccounted for b in self.balances] + [o.unaccounted for o in self.outcomes]
        return not self.differences and not any(unaccounted)


def audit(lake: Lake, contracts: Mapping[str, Contract], names: TopicNames, scope: Scope) -> Audit:
    """Audit the predictions in scope, and the coverage of all offsets. Use a lake that is pinned to a snapshot."""
    started = time.monotonic()
    recompute(lake, contracts, names, scope)
    lake.rows(queries.LETTERS)
    lake.rows(queries.REACHED)
    topics = [names.predictions, names.outcomes]
    lake.rows(queries.TAKEN, topics)
    coverage = msgspec.convert(lake.rows(queries.COVERAGE, topics), list[Coverage])
    differences = lake.rows("select stream, prediction_id as id, kind, detail from differences")
    differences += lake.rows(queries.MORE_DIFFERENCES, topics)
    differences += lake.rows(queries.DOUBLES, [scope.stream, scope.since, scope.until])
    if any(c.missing or c.twice for c in coverage):
        differences += lake.rows(queries.HOLES, topics)
    altered = queries.ALTERED.format(digest=DIGEST)
    differences += lake.rows(altered, [scope.stream, scope.since, scope.until])
    return Audit(
        snapshot_id=lake.snapshot_id(),
        balances=msgspec.convert(
            lake.rows(queries.BALANCES, [names.predictions, scope.stream, scope.since, scope.until]),
            list[Balance],
        ),
        outcomes=msgspec.convert(lake.rows(queries.OUTCOMES, [names.outcomes, scope.stream]), list[OutcomeBalance]),
        coverage=coverage,
        differences=msgspec.convert(differences, list[Difference]),
        seconds=time.monotonic() - started,
    )


def damaged_files(lake: Lake, config: Config) -> list[Difference]:
    """Files of the lake that are not what they were when they were written. Raises LakeUnavailable."""
    return [
        Difference(None, found.file.path, f"file {found.state}", found.detail or "accrual lake verify --repair")
        for found in verify(lake, config, data_files(lake))
        if found.state in DAMAGED
    ]


def audit_when_settled(config: Config, contracts: Mapping[str, Contract], scope: Scope, wait_s: float = 0.0) -> Audit:
    """Audit the newest snapshot of the configured lake, again until the books balance or `wait_s` is over.

    Of everything: first its files, and if one is damaged nothing else, since no row can be trusted then.
    Raises LakeUnavailable if there is no lake by then.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            with open_lake(config) as newest:
                snapshot = newest.snapshot_id()
                damaged = damaged_files(newest, config) if scope == Scope() else []
            if damaged:
                return Audit(snapshot, [], [], [], damaged, 0.0)
            with open_lake(config, at_snapshot=snapshot) as lake:
                found = audit(lake, contracts, TopicNames(config.topics.prefix), scope)
        except LakeUnavailable:
            if time.monotonic() >= until:
                raise
        else:
            if found.balanced or time.monotonic() >= until:
                return found
        time.sleep(min(1.0, max(0.0, until - time.monotonic())))
