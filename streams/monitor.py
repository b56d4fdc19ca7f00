"""The monitor: a Faust app over the ground-truth topic that keeps live quality by stream, model and day.

An ordinary agent and a windowed table, recovered from its changelog. It informs and decides nothing: models are judged
by the trainer, on sealed windows. Run one; it holds all partitions.

    /quality    JSON: stream → model → figures of all days, and of each day by the predictions' event time
    /metrics    the same for Prometheus
    /health     200 once the agent runs
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import faust
import msgspec

from accrual.config import Config
from accrual.events import Distribution, GroundTruth, decode_ground_truth
from accrual.kafka import TopicNames, check_topics
from streams.quality import Tally

log = logging.getLogger(__name__)

# A Faust agent handled this topic at 4,000 to 12,000 events a second: above this rate rows are sampled.
MEASURED_PER_SECOND = 3_000
WINDOW_S = timedelta(days=1).total_seconds()
_BATCH = 1_000
# So many predictions are known to be counted. Faust reads rows of transactions that abort later, and the join emits
# those again within moments; a revision that comes after so many other labels is counted as well.
_REMEMBERED = 100_000

_decode_output = msgspec.json.Decoder(Distribution).decode


def _output_of(row: GroundTruth) -> Distribution | None:
    """What the model said; None for an output of another form, which a service may send."""
    try:
        return _decode_output(row.output)
    except msgspec.DecodeError:
        return None


class Quality:
    """Tallies by (stream|model, window) in a windowed Faust table, and what may be asked of them."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._counted: OrderedDict[tuple[str, str], None] = OrderedDict()

    def measure(self, rows: Sequence[GroundTruth], stride: int) -> None:
        """Add a batch; every `stride`-th row is measured, all are counted as seen. Only first labels count."""
        new: defaultdict[tuple[str, float], Tally] = defaultdict(Tally)
        foreign = 0
        for number, row in enumerate(row for row in rows if self._is_new_first_label(row)):
            at = row.predicted_at.timestamp()
            tally = new[f"{row.stream}|{row.model}", at - at % WINDOW_S]
            tally.seen += 1
            if number % stride == 0 and not tally.add(row, _output_of(row)):
                foreign += 1
        if foreign:
            log.warning(
                "%d rows are not measured: their output is not of the form that docs/contract.md#tasks has", foreign
            )
        for (key, start), tally in new.items():
            windows, window = self._table[key], (start, start + WINDOW_S)
            kept = windows[window]
            total = tally if not kept else msgspec.convert(kept, Tally) + tally
            windows[window] = msgspec.to_builtins(total)

    def by_day(self) -> dict[str, dict[str, dict[str, Tally]]]:
        """stream → model → day (ISO date, event time) → tally."""
        found: dict[str, dict[str, dict[str, Tally]]] = {}
        for (key, (start, _)), kept in self._table.table.items():
            stream, model = key.split("|")
            day = datetime.fromtimestamp(start, UTC).date().isoformat()
            found.setdefault(stream, {}).setdefault(model, {})[day] = msgspec.convert(kept, Tally)
        return found

    def _is_new_first_label(self, row: GroundTruth) -> bool:
        """Revisions are left out: a table of sums cannot take the earlier label back.

        A first label may have any revision: that of a quorum, or of outcomes that came before their prediction.
        """
        if row.label is None:
            return False
        id_ = (row.stream, row.prediction_id)
        if id_ in self._counted:
            return False
        self._counted[id_] = None
        if len(self._counted) > _REMEMBERED:
            self._counted.popitem(last=False)
        return True


def monitor_app(config: Config, **settings: Any) -> faust.App:
    """The monitor as a Faust app; `settings` are Faust's (web_port, datadir).

    Raises TopicMismatch when topics are missing, BrokerUnavailable when no broker answers.
    """
    servers = config.kafka.bootstrap_servers.split(",")
    app = faust.App(
        f"{config.topics.prefix}-monitor",
        broker=[f"kafka://{server.strip()}" for server in servers],
        topic_partitions=check_topics(config),
        topic_replication_factor=config.topics.replication,
        store="memory://",
        # A monitor that was killed is replaced after this long, not after the minute that is the default.
        broker_session_timeout=10.0,
        broker_heartbeat_interval=3.0,
        **settings,
    )
    topic = app.topic(TopicNames(config.topics.prefix).ground_truth, key_serializer="raw", value_serializer="raw")
    # By partitioner: within a batch Faust knows the last event's partition only, and one monitor holds them all.
    table = app.Table("quality", default=list, use_partitioner=True).tumbling(WINDOW_S, key_index=True)
    quality = Quality(table)

    @app.agent(topic)
    async def measure(rows: Any) -> None:
        since = time.monotonic()
        async for values in rows.take(_BATCH, within=0.5):
            now = time.monotonic()
            rate = len(values) / max(now - since, 1e-3)
            since = now
            quality.measure([decode_ground_truth(value) for value in values], 1 + int(rate / MEASURED_PER_SECOND))

    _add_pages(app, quality)
    return app


def _add_pages(app: faust.App, quality: Quality) -> None:
    @app.page("/quality")
    async def quality_page(web: Any, _request: Any) -> Any:
        return web.json(
            {
                stream: {
                    model: {
                        **sum(days.values(), Tally()).figures(),
                        "days": {day: tally.figures() for day, tally in sorted(days.items())},
                    }
                    for model, days in sorted(models.items())
                }
                for stream, models in sorted(quality.by_day().items())
            }
        )

    @app.page("/metrics")
    async def metrics_page(web: Any, _request: Any) -> Any:
        return web.text(exposition(quality.by_day()), content_type="text/plain")

    @app.page("/health")
    async def health_page(web: Any, _request: Any) -> Any:
        return web.json({"state": "running"})


def exposition(by_day: dict[str, dict[str, dict[str, Tally]]]) -> str:
    """The totals in Prometheus' text format: one gauge a figure, labeled by stream and model."""
    lines: list[str] = []
    for figure in Tally().figures():
        name = f"accrual_live_{figure}"
        lines.append(f"# TYPE {name} gauge")
        for stream, models in sorted(by_day.items()):
            for model, days in sorted(models.items()):
                value = sum(days.values(), Tally()).figures()[figure]
                if value is not None:
                    lines.append(f'{name}{{stream="{stream}",model="{model}"}} {value}')
    return "\n".join(lines) + "\n"
