"""The join worker: a Faust app that hosts the join's loop beside its web views.

Faust's own consumer, producer and tables stay off (docs/decisions): it gives the process, its supervision and shutdown,
and the web server.

    /health                  200 while it joins, 503 when it is stuck, waits for the broker, or has stopped
    /metrics                 Prometheus (accrual/metrics.py)
    /pending/{prediction_id} one prediction's life: whether it came, was joined, revised, expired, what it waits for
                             (?entity=... where the contract has `join`: it says in which partition to look)
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import faust
from faust.app.base import BootStrategy
from faust.web import Request, Response, View
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from accrual.config import Config
from accrual.contract import CENSORED, MAX_ID_LENGTH, Contract
from accrual.events import instant
from streams.join import Entry, deadline, decision, due
from streams.loop import JoinLoop, Status

log = logging.getLogger(__name__)

STUCK_AFTER_S = 60.0
STOPPED_WITHIN_S = 25.0
ANSWER_S = 5.0


class _WebOnly(BootStrategy):
    enable_kafka = False


class _App(faust.App):
    BootStrategy = _WebOnly


def join_app(config: Config, contracts: Mapping[str, Contract], join: JoinLoop, **settings: Any) -> faust.App:
    """The worker's Faust app around a loop that does not run yet; `settings` are Faust's.

    When the loop ends by itself the process is asked to stop; `join.failure` then says why. When it is stuck, and when
    it does not stop, the process ends with exit code 1: the loop stands in a call to the Kafka client that does not
    return, and what is open is given up by the broker as after a kill.
    """
    app = _App(f"{config.topics.prefix}-join", **settings)

    @app.service
    class JoinService(faust.Service):
        """Runs the loop in a thread of its own for as long as the app runs."""

        @faust.Service.task
        async def host(self) -> None:
            await asyncio.to_thread(join.run)
            if not join.stopping.is_set():
                signal.raise_signal(signal.SIGTERM)

        @faust.Service.task
        async def watch(self) -> None:
            # librdkafka may hang in a request whose timeout is long over (its issue 5456), and its heartbeats keep the
            # partitions here. Seconds are counted, not measured: a process that was frozen itself is not stuck.
            seconds, turned_at = 0, 0.0
            while not (self.should_stop or join.stopped.is_set()):
                seconds = seconds + 1 if turned_at == join.status.turned_at else 0
                turned_at = join.status.turned_at
                if seconds > STUCK_AFTER_S:
                    _give_up(f"the loop has not turned for {STUCK_AFTER_S:.0f} s")
                await asyncio.sleep(1.0)

        async def on_stop(self) -> None:
            join.stop()
            if not await asyncio.to_thread(join.stopped.wait, STOPPED_WITHIN_S):
                _give_up(f"the loop has not stopped for {STOPPED_WITHIN_S:.0f} s")

    @app.page("/health")
    async def health(self: View, _request: Request) -> Response:
        status = join.status
        return self.json(_health(status), status=200 if is_healthy(status) else 503)

    @app.page("/metrics")
    async def metrics(self: View, _request: Request) -> Response:
        return self.bytes(generate_latest(), content_type=CONTENT_TYPE_LATEST.partition(";")[0])

    @app.page("/pending/{prediction_id}")
    async def pending(self: View, request: Request, prediction_id: str) -> Response:
        key = request.query.get("entity", prediction_id)
        if max(len(prediction_id), len(key)) > MAX_ID_LENGTH:
            return self.json({"error": f"an id has at most {MAX_ID_LENGTH} characters"}, status=400)
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(join.ask(prediction_id, key)), ANSWER_S)
        except TimeoutError:
            return self.json({"error": "the worker is not joining at the moment", **_health(join.status)}, status=503)
        if not answer.entries:
            here = "this worker has" if answer.entries is not None else "another worker has"
            problem = f"nothing is known of it in partition {answer.partition}, which {here}"
            return self.json({"error": problem, "partition": answer.partition}, status=404)
        return self.json([_life(contracts[stream], prediction_id, entry) for stream, entry in answer.entries.items()])

    return app


def is_healthy(status: Status) -> bool:
    """Whether the loop does its work: it runs or recovers, and its last sign of life is not old."""
    return status.phase in ("running", "recovering") and time.monotonic() - status.turned_at < STUCK_AFTER_S


def _give_up(why: str) -> None:
    log.critical("%s; ending this process: nothing is lost, the next one starts from what is committed", why)
    os._exit(1)


def _health(status: Status) -> dict[str, Any]:
    now = time.monotonic()
    return {
        "state": status.phase,
        "partitions": status.partitions,
        "lag": status.lag,
        "last_turn_age_s": round(now - status.turned_at, 3),
        "last_commit_age_s": None if status.committed_at is None else round(now - status.committed_at, 3),
        "problem": status.problem,
    }


def _life(contract: Contract, prediction_id: str, entry: Entry) -> dict[str, Any]:
    """One prediction's life so far, and what comes next. Times are event time: the stream's, not the clock's."""
    seen = len(entry.known) + len(entry.kept) + len(entry.waiting)
    known = {"stream": contract.stream, "prediction_id": prediction_id, "outcomes_seen": seen}
    next_at = _text(due(entry, contract))
    if entry.said is None:
        return known | {
            "status": "outcome waits for its prediction",
            "outcomes_observed_at": [_text(outcome.seen.observed_at) for outcome in entry.waiting],
            "waits_for": f"its prediction; without one, an outcome becomes an orphan after {next_at}",
        }
    decided, ends = decision(entry, contract), deadline(contract, entry.said)
    by_expiry = contract.on_expiry if entry.expired and contract.on_expiry != CENSORED else None
    if decided is None and not entry.expired:
        waits_for = f"an outcome; without one it expires at {next_at}"
    elif contract.late == "revise":
        waits_for = "further outcomes, each of which counts, until it is forgotten"
    else:
        waits_for = f"outcomes observed by {_text(ends)}, which count until it is forgotten"
    return known | {
        "status": "labeled" if decided else "expired" if entry.expired else "pending",
        "model": entry.said.model,
        "entity": entry.said.entity,
        "predicted_at": _text(entry.said.predicted_at),
        "deadline": _text(ends),
        "outcomes_counting": entry.revision,
        "revision": entry.revision if decided else 0,
        "label": decided.label if decided else by_expiry,
        "source": decided.outcome.source if decided else None,
        "observed_at": _text(decided.outcome.observed_at) if decided else None,
        "expired": entry.expired,
        "forgotten_after": _text(ends + contract.remember_us),
        "waits_for": waits_for,
    }


def _text(moment: int) -> str:
    return instant(moment).isoformat()
