"""The contenders: how each is started on the same input topics, and what it promises."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from peers.faust import run as faust
from peers.kafka_streams import run as kafka_streams
from peers.quix import run as quix

from accrual.config import Config, load_config
from accrual.kafka import TopicNames

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Launch:
    """A command to start, with its environment, consumer group and output topic (None: it has none)."""

    argv: list[str]
    env: dict[str, str]
    group: str
    output: str | None


@dataclass(frozen=True)
class Contender:
    """`launch` makes the command of one run, from the inputs' configuration, the run's name and an empty folder.

    `slow`: it is given fewer events. `promise`: what is guaranteed of its output after a crash.
    """

    name: str
    launch: Callable[[Config, str, Path], Launch]
    promise: str
    slow: bool = False


def _accrual(config: Config, _run: str, state: Path) -> Launch:
    return worker(config, state, "bench")


def worker(config: Config, state: Path, name: str) -> Launch:
    """A join worker of this name."""
    own = msgspec.structs.replace(config, state=str(state))
    argv = [sys.executable, "-m", "streams", "worker", "--web-port", "0", "--worker-id", name]
    prefix = config.topics.prefix
    return Launch(argv, own.environment(), f"{prefix}.join", TopicNames(prefix).ground_truth)


def _read_only(config: Config, run: str, state: Path) -> Launch:
    own = msgspec.structs.replace(config, state=str(state))
    argv = [sys.executable, str(HERE / "peers" / "read_only.py"), run]
    return Launch(argv, own.environment() | {"PYTHONPATH": str(HERE.parent)}, run, None)


def _peer(command: Callable[[Path], list[str]]) -> Callable[[Config, str, Path], Launch]:
    def launch(config: Config, run: str, state: Path) -> Launch:
        names = TopicNames(config.topics.prefix)
        output = f"{run}.ground-truth"
        given = {
            "bootstrap": config.kafka.bootstrap_servers,
            "predictions": names.predictions,
            "outcomes": names.outcomes,
            "output": output,
            "group": run,
            "state": str(state),
        }
        arguments = [word for name, value in given.items() for word in (f"--{name}", value)]
        return Launch([*command(load_config().state_dir / "bench"), *arguments], {}, run, output)

    return launch


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("accrual", _accrual, "exactly once"),
        Contender("read-only", _read_only, "reads and decodes, joins nothing"),
        Contender("kafka-streams", _peer(kafka_streams.command), "exactly once"),
        Contender("quix", _peer(quix.command), "exactly once", slow=True),
        Contender("faust", _peer(faust.command), "at least once", slow=True),
    )
}
PEERS = ("kafka-streams", "quix", "faust")
