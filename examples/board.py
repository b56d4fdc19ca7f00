"""The demo's live board: what the loop is doing right now, from its topics, its lake, its monitor and its service."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import LakeUnavailable
from accrual.events import decode_ground_truth
from accrual.kafka import OFFSET_BEGINNING, Message, TopicNames, TopicPartition, consumer, partition_counts
from accrual.lake import Lake, open_lake
from accrual.ledger import Generation, Run, decode_generation, decode_ledger_entry
from accrual.supervisor import Supervisor
from examples.service import Progress


class _Quality(msgspec.Struct, frozen=True):
    """What the monitor says of one model's labeled predictions so far."""

    seen: int
    accuracy: float | None
    brier: float | None
    ece: float | None


class Sealed(msgspec.Struct, frozen=True):
    """How far lake and trainer are. `done`: no sealed window is left that a challenger could still be judged on."""

    records: int = 0
    windows: int = 0
    done: bool = False


# A challenger that waits can be judged on windows it does not know. Where none waits, one may be in training: it began
# after the last verdict, with all windows sealed by then, and can be judged on those sealed since; none is if the
# windows that no run was given hold fewer rows than the contract's trigger wants.
_SEALED = """
    with run as (
        select arg_max(state, "offset") as state, arg_max(windows, "offset") as windows, max("at") as ended
        from runs where stream = $1 group by run_id
    ), sealed as (
        select coalesce(max("window"), 0) as last, max(sealed_at) as sealed_at from windows where stream = $1
    ), waiting as (
        select case when count(*) > 0 then  -- greatest() passes over a null
            greatest(max(list_max(windows)), (select max("window") from evaluations where stream = $1)) end as known
        from run where state in ('trained', 'waiting')
    ), untried as (
        select coalesce(sum(trainable), 0) as rows from windows
        where stream = $1 and "window" > coalesce((select max(list_max(windows)) from run), 0)
    )
    select coalesce((select sum(next_offset) from offsets), 0)::bigint as records, last::int as windows,
           case when last = 0 then true
                when known is not null then known >= last
                else rows < $2 or coalesce((select max(ended) from run) > sealed_at, false) end as done
    from sealed, waiting, untried
"""
_EVERY_S = 1.0

_decode_quality = msgspec.json.Decoder(dict[str, dict[str, _Quality]]).decode


def sealed_of(lake: Lake, stream: str, rows_to_train: int) -> Sealed:
    """How far a stream is. `rows_to_train`: how many rows of new windows set off a run; 0 where a window does."""
    return msgspec.convert(lake.rows(_SEALED, [stream, rows_to_train])[0], Sealed)


class Board:
    """Reads what grows; `render` and `line` show it. `quality_url` is the monitor's page of live quality."""

    def __init__(self, config: Config, contract: Contract, service_log: Path, quality_url: str) -> None:
        self.progress: Progress | None = None
        self.labeled = 0
        self._expired: set[str] = set()
        self.dead_letters = 0
        self.quality: dict[str, _Quality] = {}
        self.champion: Generation | None = None
        self.run: Run | None = None
        self.sealed = Sealed()
        self._config = config
        self._stream = contract.stream
        self._rows_to_train = contract.training.triggers.rows or 0
        self._lake: Lake | None = None
        self._looked = self._lake_changed = time.monotonic()
        self._quality_url = quality_url
        self._names = TopicNames(config.topics.prefix)
        self._service_log = service_log
        self._log_read = 0
        self._started = time.monotonic()
        self._reader = consumer(config, f"{config.topics.prefix}.board")
        counts = partition_counts(config)
        watched = (self._names.ground_truth, self._names.dead_letters, self._names.models, self._names.training)
        self._reader.assign([TopicPartition(t, p, OFFSET_BEGINNING) for t in watched for p in range(counts[t])])

    def poll(self, seconds: float) -> None:
        """Take in what has come, waiting at most `seconds` for something."""
        for message in self._reader.consume(5000, seconds):
            if message.error() is None:
                self._take(message)
        self._read_service_log()
        if time.monotonic() - self._looked > _EVERY_S:
            self._read_lake()
            self._ask_monitor()
            self._looked = time.monotonic()

    @property
    def expired(self) -> int:
        """Predictions whose horizon passed without an outcome (some get one yet, where the contract lets it count)."""
        return len(self._expired)

    def is_settled(self, quiet_s: float) -> bool:
        """Whether nothing is left to be judged and the lake took in nothing for `quiet_s` seconds."""
        return self.sealed.done and time.monotonic() - self._lake_changed > quiet_s

    def close(self) -> None:
        """Stop reading."""
        self._reader.close()
        if self._lake is not None:
            self._lake.close()

    def _take(self, message: Message) -> None:
        topic, value = message.topic(), message.value() or b""
        if topic == self._names.ground_truth:
            self._take_ground_truth(value)
        elif topic == self._names.dead_letters:
            self.dead_letters += 1
        elif topic == self._names.models:
            self.champion = decode_generation(value)
        else:
            entry = decode_ledger_entry(value)
            if isinstance(entry, Run):
                self.run = entry

    def _take_ground_truth(self, value: bytes) -> None:
        row = decode_ground_truth(value)
        if row.status == "expired":
            self._expired.add(row.prediction_id)
        elif row.revision == 1:
            self.labeled += 1
            self._expired.discard(row.prediction_id)

    def _read_lake(self) -> None:
        try:
            if self._lake is None:
                self._lake = open_lake(self._config)
            sealed = sealed_of(self._lake, self._stream, self._rows_to_train)
        except LakeUnavailable:  # not made yet, or busy: the next look will tell
            return
        if sealed != self.sealed:
            self.sealed, self._lake_changed = sealed, time.monotonic()

    def _ask_monitor(self) -> None:
        try:
            with urllib.request.urlopen(self._quality_url, timeout=0.5) as answer:
                self.quality = _decode_quality(answer.read()).get(self._stream, {})
        except OSError:  # it starts, or was killed and starts again
            pass

    def _read_service_log(self) -> None:
        if not self._service_log.exists():
            return
        with self._service_log.open("rb") as log:
            log.seek(self._log_read)
            news = log.read()
        whole = news[: news.rfind(b"\n") + 1]
        self._log_read += len(whole)
        for line in whole.splitlines():
            if line.startswith(b"{"):
                self.progress = msgspec.json.decode(line, type=Progress)

    def line(self) -> str:
        """The state in one line, for a log instead of a terminal."""
        said = self.progress
        return (
            f"{time.monotonic() - self._started:4.0f} s  {said.predictions if said else 0:>6,} predictions,"
            f" {self.labeled:,} labeled, {self.expired:,} expired, {self.dead_letters:,} dead letters,"
            f" {self.sealed.windows} windows sealed;"
            f" champion {self.champion.model if self.champion else 'none yet'}; {self._trainer()}"
        )

    def render(self, title: str, supervisor: Supervisor) -> RenderableType:
        """The board as something rich can draw."""
        said = self.progress
        captured = said.predictions if said else 0
        sums = Table.grid(padding=(0, 3))
        sums.add_row(
            *(
                Text.assemble((f"{count:,} ", "bold"), (name, "dim"))
                for name, count in (
                    ("predictions", captured),
                    ("labeled", self.labeled),
                    ("expired", self.expired),
                    ("pending", max(0, captured - self.labeled - self.expired)),
                    ("dead letters", self.dead_letters),
                    ("windows sealed", self.sealed.windows),
                )
            )
        )
        done = said.predictions + said.outcomes if said else 0
        when = f"{said.event_time:%Y-%m-%d}" if said else "waiting for generation 0"
        return Group(
            Text.assemble((title, "bold"), (f"  {time.monotonic() - self._started:.0f} s", "dim")),
            Text(f"event time {when}"),
            ProgressBar(total=said.total if said else 1, completed=done, width=72),
            sums,
            self._models(),
            Text(f"trainer: {self._trainer()}"),
            Text(f"workers: {_workers({n: w.restarts for n, w in supervisor.workers.items()})}", style="dim"),
        )

    def _models(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for name in ("model in service", "labeled", "live accuracy", "live Brier", "live ECE"):
            table.add_column(name, justify="left" if name.startswith("model") else "right")
        for model, q in self.quality.items():
            champion = self.champion is not None and model == self.champion.model
            table.add_row(
                f"{model} (champion)" if champion else model,
                f"{q.seen:,}",
                *("" if figure is None else f"{figure:.3f}" for figure in (q.accuracy, q.brier, q.ece)),
                style="bold" if champion else "",
            )
        return table

    def _trainer(self) -> str:
        if self.run is None:
            return "no challenger yet" if self.champion else "making generation 0"
        about = f"challenger {self.run.version} ({self.run.rows_new:,} new rows)"
        if self.run.state in ("promoted", "rejected"):
            return f"{about} {self.run.state}: {self.run.reason}"
        if self.run.state == "failed":
            return f"{about} failed: {self.run.reason}"
        return f"{about} trained, waits for the next window"


def _workers(restarts: Mapping[str, int]) -> str:
    return ", ".join(name + (f" (restarted {count} times)" if count else "") for name, count in restarts.items())
