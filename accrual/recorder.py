"""The recorder: how a production service tells Accrual what its model said and what really happened.

An event is encoded and handed to librdkafka's local queue: microseconds, no network, no waiting. A background thread
serves the delivery reports. When the broker is away, events wait in that bounded queue, oldest first, and leave in
order once it is back; what no longer fits is refused, counted and surfaced, never silently lost.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.errors import AccrualError, BrokerUnavailable, BufferFull, RecorderClosed, Rejected
from accrual.events import Distribution, Outcome, Prediction, check_id, encode, new_prediction_id
from accrual.kafka import KafkaError, KafkaException, Message, TopicNames, producer
from accrual.pii import Hider

log = logging.getLogger(__name__)


class Undelivered(msgspec.Struct, frozen=True):
    """An event that did not reach the broker. `value` is the encoded event, so that a service can keep it elsewhere.

    `key` is the record's: the prediction's id, or the entity.
    """

    key: str
    topic: str
    value: bytes
    error: AccrualError


class _Emitter:
    """What both recorders do: encode, queue, count. Its calls may come from any thread."""

    def __init__(
        self,
        stream: str,
        config: Config | None = None,
        *,
        contract: Contract | None = None,
        on_error: Callable[[Undelivered], None] | None = None,
        buffer_events: int = 100_000,
        buffer_mib: int = 128,
        when_full: Literal["drop", "raise"] = "drop",
        deliver_within_s: float = 3600.0,
    ) -> None:
        """Connects in the background: a broker that is away is no error here. After a fork, make a new one.

        `contract`: says which inputs, values and keys are personal and are hidden before they are sent; by default the
        stream's of `contracts` in the configuration, if it is there.
        `on_error`: called with each event that is lost, from a background thread (it must not block for long).
        `buffer_events`, `buffer_mib`: the local queue's bounds, whichever is reached first.
        `when_full`: the oldest are kept; a new event is dropped (counted, `on_error`) or refused by raising BufferFull.
        `deliver_within_s`: an event the broker has not taken by then is given up (`failed`, `on_error`).
        Raises ContractError, and ConfigError if the contract wants pseudonyms and `pii.key` is missing.
        """
        self.stream = stream
        self.delivered = 0
        self.failed = 0
        self.dropped = 0
        self._accepted = 0
        self._on_error = on_error
        self._when_full = when_full
        config = load_config() if config is None else config
        self._hider = Hider(contract or _contract_of(stream, config), config.pii.key)
        self._topics = TopicNames(config.topics.prefix)
        self._count = threading.Lock()
        self._closed = threading.Event()
        properties: dict[str, str | int | Callable[..., None]] = {
            "queue.buffering.max.messages": buffer_events,
            "queue.buffering.max.kbytes": buffer_mib * 1024,
            "message.timeout.ms": int(deliver_within_s * 1000),
            "compression.type": "lz4",
            "on_delivery": self._delivery_report,
            "error_cb": self._broker_trouble,
        }
        self._producer = producer(config, **properties)
        self._reports = threading.Thread(target=self._serve_reports, name=f"recorder {stream}", daemon=True)
        self._reports.start()
        atexit.register(self._shut, 10.0)

    @property
    def buffered(self) -> int:
        """Events that wait for the broker's acknowledgement."""
        with self._count:
            return self._accepted - self.delivered - self.failed

    def predict(
        self,
        inputs: Mapping[str, Any],
        output: Distribution | Mapping[str, Any],
        *,
        model: str,
        prediction_id: str | None = None,
        entity: str | None = None,
        predicted_at: datetime | None = None,
    ) -> str:
        """Record what `model` said of `inputs`; returns the prediction's id (a new UUIDv7 unless given).

        `entity`: the loan, account or order it is made for, in a stream whose contract has `join`.

        Does not block. Checks only what is cheap (id, time zone, that all is JSON, size); the join checks the rest
        against the contract and dead-letters what breaks it. NaN and infinity become null: JSON has neither.
        Raises Rejected, RecorderClosed, and BufferFull under `when_full="raise"`.
        """
        prediction_id = new_prediction_id() if prediction_id is None else prediction_id
        key = prediction_id if entity is None else self._key_of(entity)
        event = Prediction(
            prediction_id=prediction_id,
            stream=self.stream,
            model=model,
            predicted_at=_aware("predicted_at", predicted_at),
            inputs=_raw("inputs", inputs, self._hider.inputs),
            output=_raw("output", output),
            entity=None if entity is None else key,
        )
        check_id(prediction_id, "prediction_id")
        self._send(self._topics.predictions, key, encode(event))
        return prediction_id

    def outcome(
        self,
        prediction_id: str | None,
        values: Mapping[str, Any],
        *,
        entity: str | None = None,
        observed_at: datetime | None = None,
        source: str = "outcome",
    ) -> None:
        """Record what really happened; again with other values is a revision. Does not block; raises like `predict`.

        In a stream whose contract has `join` it is given the `entity`, and None for the prediction's id. `observed_at`
        is when it was known, not when it is sent (default: now).
        """
        if entity is not None and prediction_id is None:
            key = entity = self._key_of(entity)
        elif prediction_id is not None and entity is None:
            key = prediction_id
            check_id(key, "prediction_id")
        else:
            raise Rejected("invalid_id", "an outcome names its prediction_id or, with `join` in the contract, entity")
        event = Outcome(
            prediction_id=prediction_id,
            entity=entity,
            stream=self.stream,
            observed_at=_aware("observed_at", observed_at),
            values=_raw("values", values, self._hider.values),
            source=source,
        )
        self._send(self._topics.outcomes, key, encode(event))

    def _key_of(self, entity: str) -> str:
        """The business key as it is sent. Raises Rejected for one that is no id."""
        check_id(entity, "entity")
        return self._hider.entity(entity)

    def _send(self, topic: str, key: str, value: bytes) -> None:
        if self._closed.is_set():
            raise RecorderClosed(f"this recorder of '{self.stream}' is closed; make a new one")
        with self._count:
            self._accepted += 1  # before it is queued: its report may come before the next line
        try:
            self._producer.produce(topic, value, key.encode())
        except (BufferError, KafkaException) as exc:
            with self._count:
                self._accepted -= 1
            if isinstance(exc, KafkaException):
                raise Rejected("invalid_event", f"the event has {len(value)} bytes: {exc.args[0].str()}") from exc
            self._refuse(Undelivered(key, topic, value, BufferFull(self._full())), exc)

    def _refuse(self, event: Undelivered, cause: BufferError) -> None:
        if self._when_full == "raise":
            raise event.error from cause
        with self._count:
            self.dropped += 1
        self._surface(event)

    def _full(self) -> str:
        return (
            f"the recorder's buffer holds {self.buffered} events and the broker takes none;"
            " the new event is refused (buffer_events, buffer_mib and when_full set this)"
        )

    def _serve_reports(self) -> None:
        while not self._closed.is_set():
            self._producer.poll(0.2)

    def _delivery_report(self, error: KafkaError | None, message: Message) -> None:
        """Called by librdkafka, in whichever thread polls or flushes."""
        with self._count:
            if error is None:
                self.delivered += 1
                return
            self.failed += 1
        self._surface(
            Undelivered(
                (message.key() or b"").decode(),
                message.topic() or "",
                message.value() or b"",
                BrokerUnavailable(f"not delivered to {message.topic()}: {error.str()}"),
            )
        )

    def _surface(self, lost: Undelivered) -> None:
        if self._on_error is None:
            log.warning("event of %s lost: %s", lost.key, lost.error)
            return
        try:
            self._on_error(lost)
        except Exception:
            # The reports of other events are still to be served.
            log.exception("on_error failed for the event of %s", lost.key)

    def _broker_trouble(self, error: KafkaError) -> None:
        log.warning("recorder of '%s': %s; %d events wait", self.stream, error.str(), self.buffered)

    def _shut(self, timeout: float) -> None:
        """Deliver what is queued, give up (count, surface) what could not be delivered in `timeout` seconds."""
        if self._closed.is_set():
            return
        self._closed.set()
        atexit.unregister(self._shut)
        self._producer.flush(timeout)
        if self.buffered:
            self._producer.purge()
            self._producer.flush(1.0)
        self._reports.join()


class Recorder(_Emitter):
    """Records predictions and outcomes of one stream. A context manager; also closed when the program ends."""

    def flush(self, timeout: float = 10.0) -> int:
        """Wait until the broker has acknowledged all events, at most `timeout` seconds; returns how many still wait."""
        self._producer.flush(timeout)
        return self.buffered

    def close(self, timeout: float = 10.0) -> None:
        """Flush; what is not delivered after `timeout` seconds counts as `failed` and goes to `on_error`."""
        self._shut(timeout)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncRecorder(_Emitter):
    """The same for asyncio: `predict` and `outcome` are plain calls (they do not wait); what waits is awaited."""

    async def flush(self, timeout: float = 10.0) -> int:  # noqa: ASYNC109 - librdkafka's flush ends by itself
        """Like `Recorder.flush`, without blocking the event loop."""
        await asyncio.to_thread(self._producer.flush, timeout)
        return self.buffered

    async def close(self, timeout: float = 10.0) -> None:  # noqa: ASYNC109
        """Like `Recorder.close`, without blocking the event loop."""
        await asyncio.to_thread(self._shut, timeout)

    async def __aenter__(self) -> AsyncRecorder:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _contract_of(stream: str, config: Config) -> Contract | None:
    """The stream's contract, where the service has it."""
    folder = Path(config.contracts)
    contract = load_contracts(folder).get(stream) if any(folder.glob("*.yaml")) else None
    if contract is None:
        log.warning(
            "no contract of '%s' in %s: personal data of its events, if it names any, is not hidden", stream, folder
        )
    return contract


def _raw(
    field: str, value: Mapping[str, Any] | Distribution, hide: Callable[[Any], Mapping[str, Any]] | None = None
) -> msgspec.Raw:
    try:
        value = value if hide is None else hide(value)
        return msgspec.Raw(encode(value if isinstance(value, Distribution | dict) else dict(value)))
    except (TypeError, ValueError, RecursionError) as exc:
        raise Rejected("invalid_event", f"{field} cannot be written as JSON: {exc}") from exc


def _aware(field: str, moment: datetime | None) -> datetime:
    if moment is None:
        return datetime.now(UTC)
    if moment.tzinfo is None:
        raise Rejected("invalid_event", f"{field} has no time zone; write e.g. datetime.now(UTC)")
    return moment
