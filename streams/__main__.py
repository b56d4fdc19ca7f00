"""`python -m streams worker | monitor`: the processes of this stage (also `accrual join`, `accrual monitor`)."""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faust
import typer

from accrual.cli import run
from accrual.config import Config, load_config
from accrual.contract import load_contracts
from accrual.errors import ConfigError
from accrual.kafka import check_topics

log = logging.getLogger("streams")

app = typer.Typer(
    name="streams",
    help="The stream stage: joins predictions with outcomes, and watches the quality of what comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WEB_HOST = typer.Option("127.0.0.1", envvar="ACCRUAL_WEB_HOST", help="Address the web views listen on.")


@app.command(epilog="Example:  python -m streams worker --worker-id join-2 --web-port 6076")
def worker(
    worker_id: str = typer.Option(
        f"join-{socket.gethostname()}",
        envvar="ACCRUAL_WORKER",
        help="Names this worker: unique in its group, the same after a restart.",
    ),
    web_port: int = typer.Option(6066, min=0, max=65535, help="Port of /health, /metrics, /pending/ID; 0 for none."),
    web_host: str = _WEB_HOST,
) -> None:
    """Run a join worker: predictions and outcomes become ground truth, exactly once.

    Run as many as there is work for, up to the number of partitions; each takes its share of them.
    """
    from streams.app import join_app
    from streams.loop import JoinLoop

    config = load_config()
    contracts = load_contracts(Path(config.contracts))
    check_topics(config)
    join = JoinLoop(config, contracts, worker_id)
    # A batch makes a few hundred thousand objects and no cycles: looking for some would cost a sixth of the time.
    gc.freeze()
    gc.set_threshold(1_000_000, 50, 1_000)
    with _only_one(config, worker_id):
        _host(join_app(config, contracts, join, **_settings(config, worker_id, web_host, web_port)))
    if join.failure is not None:
        raise join.failure


@app.command(epilog="Example:  python -m streams monitor --web-port 6067 &  curl localhost:6067/quality")
def monitor(
    web_port: int = typer.Option(6067, min=0, max=65535, help="Port of /quality, /metrics, /health; 0 for none."),
    web_host: str = _WEB_HOST,
) -> None:
    """Run the monitor: live accuracy, Brier score, calibration and label delay, by stream and model version."""
    from streams.monitor import monitor_app

    config = load_config()
    _host(monitor_app(config, **_settings(config, "monitor", web_host, web_port)))


def _settings(config: Config, name: str, web_host: str, web_port: int) -> dict[str, Any]:
    """Settings of a Faust app. Raises ConfigError when the port is taken."""
    if web_port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((web_host, web_port))
            except OSError as exc:
                raise ConfigError(f"cannot listen on {web_host}:{web_port} ({exc.strerror}); set --web-port") from exc
    datadir = config.state_dir / "faust" / name
    datadir.mkdir(parents=True, exist_ok=True)
    return {
        "web_enabled": bool(web_port),
        "web_host": web_host,
        "web_bind": web_host,
        "web_port": web_port or 6066,
        "datadir": str(datadir),
        "autodiscover": False,
    }


def _host(faust_app: faust.App) -> None:
    """Run a Faust app until SIGTERM or SIGINT; logs go to stderr. Exits with 1 when it crashes."""
    logs = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
        "loggers": {name: {"level": "WARNING"} for name in ("faust", "mode", "aiokafka", "asyncio", "rdkafka")},
    }
    host = faust.Worker(faust_app, loglevel="INFO", logging_config=logs, redirect_stdouts=False)
    try:
        host.execute_from_commandline()
    except SystemExit as exit_:
        if exit_.code:
            raise


@contextmanager
def _only_one(config: Config, worker_id: str) -> Iterator[None]:
    """Hold the worker's name on this machine: two would share one cache. Raises ConfigError when it is held."""
    folder = config.state_dir / "join"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{worker_id}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise ConfigError(
                f"a join worker named '{worker_id}' already runs here; give each its --worker-id"
            ) from exc
        yield


if __name__ == "__main__":
    os.environ.setdefault("FAUST_LOOP", "asyncio")
    run(app)
