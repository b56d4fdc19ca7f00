"""Publish: what the trainer says, it says through the ledger: the training and models topics.

One Kafka transaction carries a conclusion whole: the run's new state, its evaluations, and the announcement of the new
champion if there is one. A trainer that starts reads back what was said, and its transactional id ends whatever another
one left open: what was concluded once is never concluded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from accrual.config import Config
from accrual.errors import BrokerUnavailable
from accrual.events import encode
from accrual.kafka import KafkaException, TopicNames, check_topics, read_to_end, transactional_producer
from accrual.ledger import Evaluation, Generation, LedgerEntry, Run, decode_generation, decode_ledger_entry

REQUEST_S = 30.0
_OPEN = ("trained", "waiting")


class Said:
    """Everything that was said of runs, evaluations and champions, in memory."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._begun: dict[str, datetime] = {}
        self._evaluations: dict[str, list[Evaluation]] = {}
        self._champions: dict[str, Generation] = {}

    def read(self, config: Config) -> None:
        """Add what both topics hold. Raises BrokerUnavailable, TopicMismatch."""
        check_topics(config)
        names = TopicNames(config.topics.prefix)
        for message in read_to_end(config, names.training):
            self._note(decode_ledger_entry(message.value() or b""))
        for message in read_to_end(config, names.models):
            if message.value() is not None:
                champion = decode_generation(message.value() or b"")
                self._champions[champion.stream] = champion

    def say(self, entries: Sequence[Run | Evaluation], champion: Generation | None = None) -> None:
        """Add a conclusion."""
        for entry in entries:
            self._note(entry)
        if champion is not None:
            self._champions[champion.stream] = champion

    def champion(self, stream: str) -> Generation | None:
        """The generation in service, None before generation 0."""
        return self._champions.get(stream)

    def challenger(self, stream: str) -> Run | None:
        """The run whose model is trained and not yet promoted or rejected."""
        return next((run for run in self._of(stream) if run.state in _OPEN), None)

    def judged(self, run_id: str) -> set[int]:
        """The windows that a run's model was judged on so far."""
        return {e.window for e in self.evaluations(run_id) if e.role == "challenger"}

    def next_version(self, stream: str) -> int:
        """The version of the next challenger; a rejected one keeps its own."""
        return 1 + max((run.version for run in self._of(stream)), default=0)

    def last_tried(self, stream: str) -> int:
        """The last window that any run was given to learn from; 0 before the first."""
        return max((window for run in self._of(stream) for window in run.windows), default=0)

    def begun(self, stream: str) -> list[tuple[Run, datetime]]:
        """All runs in the order in which they were said, each with when that was first."""
        return [(run, self._begun[run.run_id]) for run in self._of(stream)]

    def evaluations(self, run_id: str) -> list[Evaluation]:
        """How a run's model, and those beside it, did on each window that judged it."""
        return self._evaluations.get(run_id, [])

    def trial(self, run: Run) -> int:
        """Which of the stream's judged challengers this one is, counted from 1."""
        before = [other for other in self._of(run.stream) if other.version < run.version]
        return 1 + sum(other.state != "failed" or bool(self.judged(other.run_id)) for other in before)

    def _note(self, entry: LedgerEntry) -> None:
        if isinstance(entry, Run):
            self._runs[entry.run_id] = entry
            self._begun.setdefault(entry.run_id, entry.at)
        elif isinstance(entry, Evaluation):
            self._evaluations.setdefault(entry.run_id, []).append(entry)

    def _of(self, stream: str) -> list[Run]:
        return [run for run in self._runs.values() if run.stream == stream]


class Ledger(Said):
    """What the trainer has said, and says. One process at a time writes it: a newer one fences the older."""

    def __init__(self, config: Config) -> None:
        """Open for writing, then read. Raises BrokerUnavailable, TopicMismatch."""
        check_topics(config)
        self._producer = transactional_producer(config, f"{config.topics.prefix}.trainer")
        try:
            self._producer.init_transactions(REQUEST_S)  # first: nothing can be said by another one after it is read
        except KafkaException as exc:
            raise BrokerUnavailable(f"the ledger cannot be opened: {exc.args[0].str()}") from exc
        super().__init__()
        self._names = TopicNames(config.topics.prefix)
        self.read(config)

    def say(self, entries: Sequence[Run | Evaluation], champion: Generation | None = None) -> None:
        """Append to the ledger, all or nothing. Raises BrokerUnavailable: then make a new ledger and look again."""
        try:
            self._producer.begin_transaction()
            for entry in entries:
                self._producer.produce(self._names.training, encode(entry), entry.stream.encode())
            if champion is not None:
                self._producer.produce(self._names.models, encode(champion), champion.stream.encode())
            self._producer.commit_transaction(REQUEST_S)
        except KafkaException as exc:
            raise BrokerUnavailable(f"the ledger cannot be written: {exc.args[0].str()}") from exc
        super().say(entries, champion)
