"""The transactional loop: consume, join, produce; changelog, rows, dead letters and offsets commit together.

    while not stopping:
        messages = consume(up to 20,000, for at most 200 ms)
        turn = join them, partition by partition
        one Kafka transaction: changelog + ground truth + dead letters + offsets
        one RocksDB batch: the same records, and the changelog position they stand for

One thread, one consumer, one transactional producer. Rebalances happen inside `consume`, where no transaction is open.
Whatever goes wrong with Kafka or the cache ends the session: the next one has a new producer (which ends what the old
one left open), recovers the state from the changelog and starts at the committed offsets, as after a crash. So there
is one way back, and a killed process takes the same one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from itertools import groupby
from typing import Literal, cast

import msgspec

from accrual import metrics
from accrual.config import Config
from accrual.contract import MAX_ID_LENGTH, Contract
from accrual.errors import BrokerUnavailable, Rejected, TopicMismatch, Transient
from accrual.events import MAX_EVENT_BYTES, DeadLetter, Outcome, Tick, encode, timed_outcome, timed_prediction
from accrual.kafka import (
    MAX_JOINED_BYTES,
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicNames,
    TopicPartition,
    check_topics,
    consumer,
    partition_of,
    topic_id,
    transactional_producer,
)
from streams import telemetry
from streams.join import Entry
from streams.partition import Partition
from streams.recovery import changelog_bounds, check_changelog, is_current, recover, stands_on
from streams.state import State, StateBroken, entity_key, entry_key
from streams.turn import Arrival, Arrivals, Drained, Turn

log = logging.getLogger(__name__)

BATCH = 20_000
PATIENCE_S = 0.2
REQUEST_S = 30.0
SESSION_S = 10
LEAVE_S = 5.0
LONGEST_PAUSE_S = 10.0
MEASURE_S = 5.0
MEMORY_KEYS = 200_000  # of the younger generations of all partitions together: about 100 MB

_NOTHING = Arrivals()
_NOT_OURS = 2**63  # the next offset of a partition that is not

Phase = Literal["starting", "recovering", "running", "waiting", "stopped"]


class Status(msgspec.Struct, frozen=True):
    """What the loop says of itself. Times are of the monotonic clock; `problem` is why it waits."""

    phase: Phase = "starting"
    partitions: tuple[int, ...] = ()
    lag: int = 0
    turned_at: float = 0.0
    committed_at: float | None = None
    problem: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What this worker knows of a prediction id: entries by stream; None when its `partition` is not this worker's."""

    partition: int
    entries: dict[str, Entry] | None


class JoinLoop:
    """The join's loop. `run` blocks its thread; everything else may be called from any thread."""

    def __init__(self, config: Config, contracts: Mapping[str, Contract], worker: str) -> None:
        """`worker` names this worker among all of the group, the same after a restart."""
        self.status = Status()
        self.failure: BaseException | None = None
        self.stopping = threading.Event()
        self.stopped = threading.Event()
        self.questions: queue.SimpleQueue[tuple[str, str, Future[Answer]]] = queue.SimpleQueue()
        self._config = config
        self._contracts = contracts
        self._worker = worker

    def run(self) -> None:
        """Join until `stop`, or until something that a retry will not heal: that is left in `failure`.

        A broker that is away is waited for, loudly.
        """
        pause = 0.5
        try:
            while not self.stopping.is_set():
                session = _Session(self, self._config, self._contracts, self._worker)
                try:
                    session.run()
                except (KafkaException, Transient) as exc:
                    pause = 0.5 if session.commits else min(2 * pause, LONGEST_PAUSE_S)
                    problem = exc.args[0].str() if isinstance(exc, KafkaException) else str(exc)
                    self.report(phase="waiting", partitions=(), problem=problem)
                    log.error("%s; nothing is lost: starting again from what is committed in %.1f s", problem, pause)
                    metrics.JOIN_SESSIONS_FAILED.inc()
                    self.stopping.wait(pause)
                finally:
                    session.close()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the worker ends with it
            self.failure = exc
        finally:
            self.report(phase="stopped", partitions=())
            self.stopped.set()

    def stop(self) -> None:
        """End `run` after the turn it is in."""
        self.stopping.set()

    def ask(self, prediction_id: str, key: str) -> Future[Answer]:
        """What is known of a prediction whose record has this key; answered by the loop's thread between two turns."""
        future: Future[Answer] = Future()
        self.questions.put((prediction_id, key, future))
        return future

    def report(self, **news: object) -> None:
        """Change the status. For the loop's own thread."""
        self.status = msgspec.structs.replace(self.status, turned_at=time.monotonic(), **news)


class _Session:
    """One life of consumer and producer, from joining the group to the first error or the stop."""

    def __init__(self, loop: JoinLoop, config: Config, contracts: Mapping[str, Contract], worker: str) -> None:
        self.commits = 0
        self._loop = loop
        self._config = config
        self._contracts = contracts
        self._worker = worker
        self._topics = TopicNames(config.topics.prefix)
        self._inputs = (self._topics.predictions, self._topics.outcomes)
        self._partitions: dict[int, Partition] = {}
        self._revoked: dict[int, State] = {}  # still open: most come back with the assignment that follows
        self._given_away: list[int] = []  # of these, the ones that did not come back with it
        self._next: dict[tuple[str, int], int] = {}
        self._drained: set[tuple[str, int]] = set()
        self._count = 0
        self._patience = PATIENCE_S
        self._rebalance_failure: Exception | None = None
        self._lag_at = self._measured_at = 0.0
        # Readers of committed records wait for a worker that died with its machine as long as its transaction may last.
        produces: dict[str, str | int | float] = {
            "transaction.timeout.ms": 15_000,
            "queue.buffering.max.messages": 1_000_000,
            "message.max.bytes": MAX_JOINED_BYTES,
            "compression.type": "lz4",
        }
        self._producer = transactional_producer(config, f"{config.topics.prefix}.{worker}", **produces)
        consumes: dict[str, str | int | bool] = {
            "group.instance.id": worker,  # started again within the session timeout, it has its partitions back at once
            "session.timeout.ms": SESSION_S * 1000,
            "heartbeat.interval.ms": 500,  # so soon it hears that another one came or went: until then all wait
            "max.poll.interval.ms": 900_000,  # recovery happens inside one poll
            "partition.assignment.strategy": "range",
            "enable.partition.eof": True,
            "auto.offset.reset": "error",  # offsets that are gone mean lost events: never skip them in silence
        }
        self._consumer = consumer(config, f"{config.topics.prefix}.join", **consumes)

    def run(self) -> None:
        """Join the group and turn until the loop is stopped. Raises KafkaException and AccrualError."""
        self._loop.report(phase="starting")
        self._count = check_topics(self._config)
        self._changelog_id = topic_id(self._config, self._topics.changelog)
        self._producer.init_transactions(REQUEST_S)
        self._consumer.subscribe(
            list(self._inputs),
            on_assign=self._on_assign,
            on_revoke=lambda *_: self._set_aside(),
            on_lost=lambda *_: self._set_aside(),
        )
        while not self._loop.stopping.is_set():
            self._turn()
        self._leave()

    def _leave(self) -> None:
        """Give the partitions to the others now: whoever only closes keeps them for the session timeout."""
        self._consumer.unsubscribe()
        deadline = time.monotonic() + LEAVE_S
        while self._consumer.memberid() and time.monotonic() < deadline:  # it goes when the group is told
            self._consumer.consume(1, 0.05)

    def close(self) -> None:
        """End both clients; an open transaction is aborted. Never raises: there is nothing left to save.

        Unless it left before, the group keeps this worker's partitions for it, for the session timeout.
        """
        try:
            self._producer.abort_transaction(5.0)
        except KafkaException:
            pass  # none is open, or the broker is away and will end it after its timeout
        try:
            self._consumer.close()
        except (KafkaException, RuntimeError, Transient) as exc:
            log.warning("leaving the group: %s", exc)
        self._set_aside()
        self._close_revoked(*self._revoked)

    def _turn(self) -> None:
        messages = self._consumer.consume(BATCH, self._patience)
        if self._rebalance_failure is not None:
            raise self._rebalance_failure
        if self._loop.stopping.is_set():
            return  # it cuts a recovery short: nothing may be joined with the state that is left then
        arrivals, rejected, offsets = self._read(messages)
        turns = {}
        for number, partition in self._partitions.items():
            came = arrivals.get(number, _NOTHING)
            drained = Drained(*((topic, number) in self._drained for topic in self._inputs))
            turn = partition.turn(came, drained, time.monotonic())
            if came or turn.fired or turn.ticks:  # also where nothing is to be remembered: a letter, an event astray
                turns[number] = turn
        # More timers are due than one turn takes: the next one does not wait for events.
        self._patience = 0.0 if any(turn.more_due for turn in turns.values()) else PATIENCE_S
        if turns or offsets:
            self._commit(turns, rejected, offsets)
        if self._given_away:  # one a turn: it takes a while, and those that are joined wait for it
            self._close_revoked(self._given_away.pop())
        self._answer_questions()
        self._report()

    def _read(
        self, messages: Iterable[Message]
    ) -> tuple[dict[int, Arrivals], list[DeadLetter], dict[tuple[str, int], int]]:
        """Valid events by partition, dead letters of the others, and the offsets that are then done."""
        arrivals: dict[int, Arrivals] = {}
        rejected: list[DeadLetter] = []
        offsets: dict[tuple[str, int], int] = {}
        for (topic, number, is_event), run in groupby(messages, _origin):
            place = (topic, number)
            if not is_event:
                for message in run:
                    self._note_end(place, message)
                continue
            start = next_offset = self._next.get(place, _NOT_OURS)
            came = arrivals.setdefault(number, Arrivals())
            is_outcome = topic == self._topics.outcomes
            read = timed_outcome if is_outcome else timed_prediction
            into = came.outcomes if is_outcome else came.predictions
            for message in run:
                offset = cast(int, message.offset())
                if offset < next_offset:
                    continue  # fetched before a rebalance: not ours any more, or read again
                next_offset = offset + 1
                key, value = message.key(), message.value()
                try:
                    event, at = read(value, key, message.timestamp()[1], self._contracts)
                except Rejected as rejection:
                    rejected.append(_dead_letter(rejection, topic, number, offset, key, value))
                    continue
                if isinstance(event, Tick):
                    came.ticks.append(event)
                    continue
                if event.prediction_id is None:
                    entity = entity_key(event.stream, event.entity or "")
                    came.claims.append(Arrival(entity, key or b"", offset, event, at, value or b""))
                    continue
                entry = entry_key(event.stream, event.prediction_id)
                into.append(Arrival(entry, key or b"", offset, event, at, value or b""))
            if next_offset > start:
                self._next[place] = offsets[place] = next_offset
                self._drained.discard(place)
        return arrivals, rejected, offsets

    def _note_end(self, place: tuple[str, int], message: Message) -> None:
        """A partition was read to its end. Raises KafkaException for any other error."""
        error = cast(KafkaError, message.error())
        if error.code() != KafkaError._PARTITION_EOF:
            raise KafkaException(error)
        # The end of what is committed is not the end: behind an open transaction there may be more.
        _, end = self._consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
        if cast(int, message.offset()) >= end:
            self._drained.add(place)

    def _commit(
        self, turns: Mapping[int, Turn], rejected: Iterable[DeadLetter], offsets: Mapping[tuple[str, int], int]
    ) -> None:
        """One transaction; then, and only then, the states."""
        started = time.monotonic()
        self._producer.begin_transaction()
        self._produce(self._topics.dead_letters, 0, ((letter.key, encode(letter)) for letter in rejected))
        for number, turn in turns.items():
            self._produce(self._topics.ground_truth, number, turn.rows)
            self._produce(self._topics.dead_letters, 0, ((letter.key, encode(letter)) for letter in turn.letters))
            for home, stray in turn.strays:
                topic = self._topics.outcomes if isinstance(stray.event, Outcome) else self._topics.predictions
                self._produce(topic, home, [(stray.id_, stray.record)])
            self._produce(self._topics.predictions, number, ((tick.tick.encode(), encode(tick)) for tick in turn.ticks))
            self._produce(self._topics.changelog, number, turn.records[:-1])
            self._produce(self._topics.changelog, number, turn.records[-1:], self._stands_at)
        # All that the offsets stand for is on the broker before they are: a worker that takes over may rely on it.
        if self._producer.flush(REQUEST_S):
            raise BrokerUnavailable(f"the broker did not take a batch within {REQUEST_S:.0f} s")
        if offsets:
            self._producer.send_offsets_to_transaction(
                [
                    TopicPartition(
                        topic, number, offset, stands_on(self._changelog_id, self._partitions[number].stands_at)
                    )
                    for (topic, number), offset in offsets.items()
                ],
                self._consumer.consumer_group_metadata(),
                REQUEST_S,
            )
        self._producer.commit_transaction(REQUEST_S)
        for number, turn in turns.items():
            self._partitions[number].save(turn)
        self.commits += 1
        now = time.monotonic()
        telemetry.count(turns.values(), rejected, now - started)
        self._loop.report(phase="running", committed_at=now, problem="")

    def _produce(
        self,
        topic: str,
        partition: int,
        records: Iterable[tuple[bytes | None, bytes | None]],
        on_delivery: Callable[[KafkaError | None, Message], None] | None = None,
    ) -> None:
        """Hand records, by key and value, to the producer; waits while it is full."""
        produce = self._producer.produce
        for key, value in records:
            while True:
                try:
                    produce(topic, value, key, partition, on_delivery=on_delivery)
                    break
                except BufferError:
                    self._producer.poll(0.1)

    def _stands_at(self, error: KafkaError | None, message: Message) -> None:
        """Delivery report of a partition's last changelog record. (After an error the commit fails.)"""
        if error is None:
            self._partitions[cast(int, message.partition())].stands_at = cast(int, message.offset()) + 1

    def _on_assign(self, client: Consumer, assigned: list[TopicPartition]) -> None:
        """Called within `consume`; what goes wrong is raised after it.

        A KafkaException from in here would come out of `consume` as a KafkaError, which is no exception: nothing would
        catch it (confluent-kafka 2.16.1).
        """
        try:
            self._assign(client, assigned)
        except Exception as exc:  # noqa: BLE001 - raised after `consume`
            self._rebalance_failure = exc

    def _assign(self, client: Consumer, assigned: list[TopicPartition]) -> None:
        """Recover the state of the partitions, then start where the group has committed.

        In this order, and waiting for open transactions in both: what a former owner committed is seen in both.
        """
        numbers = sorted({place.partition for place in assigned})
        by_topic = {topic: {p.partition for p in assigned if p.topic == topic} for topic in self._inputs}
        if len(set(map(frozenset, by_topic.values()))) > 1 or any(number >= self._count for number in numbers):
            raise TopicMismatch(
                f"assigned partitions {by_topic} of topics with {self._count}: their partition counts have changed;"
                " restore equal counts and restart the workers"
            )
        self._loop.report(phase="recovering", partitions=tuple(numbers))
        folder = self._config.state_dir / "join" / self._topics.prefix / self._worker
        bounds = changelog_bounds(self._config, numbers)
        behind: dict[int, State] = {}
        for number in numbers:
            state = self._revoked.get(number)
            if state is not None and is_current(state, bounds[number]):
                del self._revoked[number]
            else:
                self._close_revoked(number)
                behind[number] = state = State(folder / str(number), self._changelog_id, self._contracts)
            state.younger_keys = MEMORY_KEYS // len(numbers)
            self._partitions[number] = Partition(number, self._count, state, self._contracts, self._topics)
        recover(self._config, behind, bounds, self._loop.stopping, self._loop.report)
        for partition in self._partitions.values():
            partition.stands_at = partition.state.offset
        starts = []
        for place in client.committed(assigned, timeout=REQUEST_S):
            if place.error is not None:
                raise KafkaException(place.error)
            check_changelog(
                self._config, place.partition, self._changelog_id, bounds[place.partition][1], place.metadata
            )
            start = place.offset if place.offset >= 0 else OFFSET_BEGINNING
            self._next[place.topic, place.partition] = max(start, 0)
            starts.append(TopicPartition(place.topic, place.partition, start))
        client.assign(starts)
        self._loop.report(phase="running")
        log.info("joining partitions %s", numbers)
        self._given_away = [*self._revoked]

    def _set_aside(self) -> None:
        """Join nothing more, until the next assignment.

        Nothing is pending: what was joined is committed, the rest will be read again by whoever comes next.
        """
        self._revoked |= {number: partition.state for number, partition in self._partitions.items()}
        self._partitions.clear()
        self._given_away.clear()
        self._next.clear()
        self._drained.clear()
        self._loop.report(partitions=())

    def _close_revoked(self, *numbers: int) -> None:
        """Close the states of these partitions, as far as they are still open."""
        for number in numbers:
            state = self._revoked.pop(number, None)
            if state is not None:
                try:
                    state.close()
                except StateBroken as exc:
                    log.warning("%s", exc)

    def _answer_questions(self) -> None:
        while True:
            try:
                prediction_id, key, future = self._loop.questions.get_nowait()
            except queue.Empty:
                return
            number = partition_of(key.encode(), self._count)
            partition = self._partitions.get(number)
            future.set_result(Answer(number, None if partition is None else partition.known(prediction_id)))

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._lag_at < 1.0:
            self._loop.report()
            return
        self._lag_at = now
        lag = 0
        for (topic, number), offset in self._next.items():
            _, end = self._consumer.get_watermark_offsets(TopicPartition(topic, number), cached=True)
            lag += max(0, end - offset)
        self._loop.report(lag=lag)
        metrics.JOIN_LAG.set(lag)
        if now - self._measured_at > MEASURE_S:
            self._measured_at = now
            telemetry.measure(self._partitions.values(), self._contracts)


def _origin(message: Message) -> tuple[str, int, bool]:
    """Topic and partition, and whether it is an event (and no error)."""
    return cast(str, message.topic()), cast(int, message.partition()), message.error() is None


def _dead_letter(
    rejection: Rejected, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None
) -> DeadLetter:
    """What is kept of a record that is no valid event; its stream and id as far as they can be read."""
    value = None if value is None else value[:MAX_EVENT_BYTES]
    try:
        names = _decode_names(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        names = _Names()
    prediction_id = names.prediction_id
    return DeadLetter(
        reason=rejection.reason,
        detail=rejection.detail,
        topic=topic,
        partition=partition,
        offset=offset,
        key=key,
        value=value,
        stream=names.stream,
        prediction_id=prediction_id if prediction_id and len(prediction_id) <= MAX_ID_LENGTH else None,
    )


class _Names(msgspec.Struct, frozen=True):
    stream: str | None = None
    prediction_id: str | None = None


_decode_names = msgspec.json.Decoder(_Names).decode
