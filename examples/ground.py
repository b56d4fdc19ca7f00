"""The ground the demo runs on: a folder of its own, a broker, topics of its own, and nothing left of the last run."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import yaml

from accrual.broker import HOST, DevelopmentBroker
from accrual.config import Config
from accrual.contract import Contract, load_contracts
from accrual.errors import BrokerUnavailable, ConfigError
from accrual.kafka import create_topics, delete_topics, wait_until_ready

_MARK = "demo.json"


class _Mark(msgspec.Struct, frozen=True):
    """Says that a folder was made by a demo, and under which prefix its topics are."""

    prefix: str


@contextmanager
def reached_broker(config: Config, keep: bool) -> Iterator[tuple[Config, bool]]:
    """The configuration of a broker that answers, and whether it was started for this.

    When none answers at an address of this machine, a development broker is started on a free port, and stopped at the
    end unless `keep`. Raises BrokerUnavailable when the configured broker is elsewhere and does not answer.
    """
    address = config.kafka.bootstrap_servers
    try:
        wait_until_ready(address, timeout_s=2.0)
    except BrokerUnavailable:
        if address.rpartition(":")[0] not in (HOST, "localhost"):
            raise
    else:
        yield config, False
        return
    broker = DevelopmentBroker(config.state_dir / "broker")
    running = broker.status()
    started = running is None
    if running is None:
        running = broker.start()
    try:
        kafka = msgspec.structs.replace(config.kafka, bootstrap_servers=running.bootstrap)
        yield msgspec.structs.replace(config, kafka=kafka), started
    finally:
        if started and not keep:
            broker.stop()


@contextmanager
def own_folder(config: Config) -> Iterator[Path]:
    """The demo's folder in the state folder, held for the time of the run.

    Raises ConfigError when another demo holds it.
    """
    config.state_dir.mkdir(parents=True, exist_ok=True)
    with (config.state_dir / "demo.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigError(
                f"a demo already runs in {config.state_dir}; wait for its end, or set ACCRUAL_STATE to another folder"
            ) from exc
        yield config.state_dir / "demo"


def prepare(config: Config, home: Path, contract: Contract) -> tuple[Config, bool]:
    """Empty the folder of the last run, write the contract, create topics; returns the demo's own configuration.

    Also says whether there was a last run. Removes only what a demo made: raises ConfigError for a folder without its
    mark.
    """
    removed = _remove_last_run(config, home)
    (home / "contracts").mkdir(parents=True)
    prefix = f"demo-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    (home / _MARK).write_bytes(msgspec.json.encode(_Mark(prefix)))
    text = yaml.safe_dump(msgspec.to_builtins(contract), sort_keys=False, allow_unicode=True)
    (home / "contracts" / f"{contract.stream}.yaml").write_text(text, encoding="utf-8")
    own = msgspec.structs.replace(
        config,
        state=str(home),
        contracts=str(home / "contracts"),
        topics=msgspec.structs.replace(config.topics, prefix=prefix),
    )
    (home / "accrual.toml").write_text(_as_toml(own), encoding="utf-8")
    if (broker := config.state_dir / "broker").is_dir():
        (home / "broker").symlink_to(broker)  # `accrual broker` with that configuration is about the same one
    create_topics(own)
    return own, removed


def shipped_contract(config: Config, stream: str, window_rows: int) -> Contract:
    """The configured contract of a stream. If `window_rows` is not 0: with windows of that size, and trained after as
    many windows as it would be.
    """
    contract = load_contracts(Path(config.contracts)).get(stream)
    if contract is None:
        raise ConfigError(f"--stream {stream}: {config.contracts} has no contract for it")
    if not window_rows:
        return contract
    training = contract.training
    triggers = training.triggers
    if triggers.rows is not None:
        rows = triggers.rows * window_rows // training.window_rows
        triggers = msgspec.structs.replace(triggers, rows=max(1, rows))
    training = msgspec.structs.replace(training, window_rows=window_rows, triggers=triggers)
    return msgspec.structs.replace(contract, training=training)


def _as_toml(config: Config) -> str:
    """The demo's configuration for commands that look at it later: `ACCRUAL_CONFIG=.accrual/demo/accrual.toml`."""
    quoted = {
        "state": config.state,
        "contracts": config.contracts,
        "[kafka]\nbootstrap_servers": config.kafka.bootstrap_servers,
        "[topics]\nprefix": config.topics.prefix,
    }
    return "".join(f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in quoted.items())


def _remove_last_run(config: Config, home: Path) -> bool:
    if not home.exists() or not any(home.iterdir()):
        return False
    try:
        mark = msgspec.json.decode((home / _MARK).read_bytes(), type=_Mark)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"{home} was not made by a demo; move it away, or set ACCRUAL_STATE") from exc
    delete_topics(msgspec.structs.replace(config, topics=msgspec.structs.replace(config.topics, prefix=mark.prefix)))
    shutil.rmtree(home)
    return True
