"""The model feed: hands a service the current champion of a stream, and the next one as soon as it is published.

A background thread reads the models topic. A new generation is verified and loaded beside the serving one, and only
then swapped in, in one assignment: a caller that holds a champion keeps a whole one. A generation that does not verify
or load is refused, counted and surfaced; the champion before it stays.

On request it also reads the training topic, and hands out the challenger while one is frozen and not yet judged: to run
in the champion's shadow, or to serve a share of the units (A/B).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec

from accrual.config import Config, load_config
from accrual.errors import BundleError, NoChampion, NotHere
from accrual.events import Distribution
from accrual.kafka import OFFSET_BEGINNING, KafkaError, TopicNames, TopicPartition, consumer
from accrual.ledger import Generation, Run, decode_generation, decode_ledger_entry

log = logging.getLogger(__name__)

Predict = Callable[[Sequence[Mapping[str, Any]]], list[Distribution]]


class Champion(msgspec.Struct, frozen=True):
    """A loaded generation. `predict` takes a list of inputs and gives one distribution for each."""

    generation: Generation
    predict: Predict

    @property
    def model(self) -> str:
        """`stream@version`: what the service's predictions name."""
        return self.generation.model


class Challenger(msgspec.Struct, frozen=True):
    """A loaded model that is frozen and waits for its verdict. `predict` as the champion's."""

    run: Run
    predict: Predict

    @property
    def model(self) -> str:
        """`stream@version`: what predictions made with it name."""
        return self.run.model


class ModelFeed:
    """The champion of one stream, always the last one published that could be verified and loaded."""

    def __init__(
        self,
        stream: str,
        config: Config | None = None,
        *,
        challenger: bool = False,
        load: Callable[[Generation], Predict] | None = None,
        on_refused: Callable[[Generation, Exception], None] | None = None,
    ) -> None:
        """Starts reading at once, in the background.

        `challenger`: hand out the challenger too; it takes as much memory as the champion.
        `load`: makes the predict function of a generation; the default verifies the signed bundle in the model store
        and loads it with torch. `on_refused`: called from the background thread when that fails.
        """
        self.stream = stream
        self.refused = 0
        self._config = load_config() if config is None else config
        self._load = self._load_bundle if load is None else load
        self._on_refused = on_refused
        self._champion: Champion | None = None
        self._with_challenger = challenger
        self._open_run: Run | None = None
        self._tried = ""  # the run whose model was loaded last, or could not be
        self._challenger: Challenger | None = None
        self._first = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"model feed {stream}", daemon=True)
        self._thread.start()

    def champion(self, timeout: float | None = None) -> Champion:
        """The current champion; waits for the first one. Raises NoChampion after `timeout` seconds without any."""
        if not self._first.wait(timeout) or self._champion is None:
            raise NoChampion(
                f"no champion of '{self.stream}' within {timeout} s ({self.refused} generations refused);"
                " the trainer publishes generation 0 when it starts"
            )
        return self._champion

    def challenger(self) -> Challenger | None:
        """The model that waits for its verdict, if there is one that could be loaded; what it says decides nothing."""
        return self._challenger

    def assigned(self, unit: str, share: float) -> Champion | Challenger:
        """The model that serves a unit (a customer, a session) while `share` of all units are the challenger's.

        The same unit has the same model as long as the challenger waits; another challenger draws other units. Without
        one it is the champion. Raises NoChampion if there is no champion yet.
        """
        champion, challenger = self.champion(0), self._challenger
        if challenger is None:
            return champion
        drawn = hashlib.sha256(f"{challenger.run.run_id}:{unit}".encode()).digest()
        return challenger if int.from_bytes(drawn[:8]) < share * 2**64 else champion

    def close(self) -> None:
        """Stop reading; the last champion stays usable."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> ModelFeed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        names = TopicNames(self._config.topics.prefix)
        reader = consumer(self._config, f"{self._config.topics.prefix}.feed", **{"enable.partition.eof": True})
        topics = [names.models, names.training] if self._with_challenger else [names.models]
        reader.assign([TopicPartition(topic, 0, OFFSET_BEGINNING) for topic in topics])
        news: list[Generation] = []
        try:
            while not self._closed.is_set():
                message = reader.poll(0.2)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    if message.key() == self.stream.encode() and message.value() is not None:
                        if message.topic() == names.models:
                            news += _decoded(message.value() or b"")
                        else:
                            self._note(message.value() or b"")
                elif error.code() == KafkaError._PARTITION_EOF:
                    # Only now is the last one known: what it replaced need not be loaded, unless it fails.
                    self._adopt_newest(news)
                    news.clear()
                    self._adopt_challenger()
                else:
                    log.warning("model feed of '%s': %s", self.stream, error.str())
        finally:
            reader.close()

    def _note(self, value: bytes) -> None:
        """Remember the run that waits, from a record of the training topic."""
        try:
            entry = decode_ledger_entry(value)
        except msgspec.DecodeError as exc:
            log.error("a record of the training topic cannot be read: %s", exc)
            return
        if isinstance(entry, Run):
            self._open_run = entry if entry.state in ("trained", "waiting") else None

    def _adopt_challenger(self) -> None:
        run = self._open_run
        if run is None:
            self._challenger = None
        elif run.run_id != self._tried:
            generation = run.as_generation(run.at)
            self._challenger, self._tried = None, run.run_id
            try:
                self._challenger = Challenger(run, self._load(generation))
            except Exception as exc:
                # Nobody depends on it: it is not tried again, the next challenger is another run.
                log.exception("challenger %s refused", generation.model)
                self._refuse(generation, exc)
            else:
                log.info("challenger of '%s' is %s", self.stream, generation.model)

    def _adopt_newest(self, news: Sequence[Generation]) -> None:
        for generation in reversed(news):
            try:
                self._champion = Champion(generation, self._load(generation))
            except Exception as exc:
                # Whatever is wrong with it, the service goes on with the champion it has.
                log.exception("generation %s refused", generation.model)
                self._refuse(generation, exc)
            else:
                log.info("champion of '%s' is %s", self.stream, generation.model)
                self._first.set()
                return

    def _refuse(self, generation: Generation, error: Exception) -> None:
        """Count and surface a model that does not verify or load."""
        self.refused += 1
        if self._on_refused is None:
            return
        try:
            self._on_refused(generation, error)
        except Exception:
            # The feed must outlive its callback.
            log.exception("on_refused failed for %s", generation.model)

    def _load_bundle(self, generation: Generation) -> Predict:
        try:
            from accrual.predictor import Predictor  # brings numpy, and torch for a model that needs it
        except ModuleNotFoundError as exc:
            raise NotHere(f"loading a model needs {exc.name}: pip install 'accrual[trainer]'") from exc
        predictor = Predictor.load(self._config.model_store / generation.bundle, self._config)
        if (predictor.model, generation.bundle) != (generation.model, generation.digest):
            raise BundleError(f"{generation.bundle} holds {predictor.model}, and is announced as {generation.model}")
        return predictor.predict


def _decoded(value: bytes) -> list[Generation]:
    """The announcement, or nothing when it cannot be read: a newer trainer's, say."""
    try:
        return [decode_generation(value)]
    except msgspec.DecodeError as exc:
        log.error("an announcement on the models topic cannot be read: %s", exc)
        return []
