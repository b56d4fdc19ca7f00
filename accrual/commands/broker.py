"""`accrual broker`: the development broker, Apache Kafka from packages."""

from __future__ import annotations

from typing import Annotated

import typer

from accrual.broker import HOST, DevelopmentBroker
from accrual.config import Config, cache_dir, load_config
from accrual.errors import BrokerSetupError, BrokerUnavailable
from accrual.kafka import wait_until_ready
from accrual.kafka_jars import ensure_jars

app = typer.Typer(
    help="The development broker: Apache Kafka on this machine, without Java, Docker or Maven.",
    epilog="Production runs its own Kafka: name it in kafka.bootstrap_servers.",
    no_args_is_help=True,
)


@app.command(
    epilog="Examples:  accrual broker start   |   accrual broker start --port 19092   |   accrual broker start --port 0"
)
def start(
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port to listen on; 0 takes a free one. Default: that of kafka.bootstrap_servers."
        ),
    ] = None,
) -> None:
    """Start the broker in the background and return when it answers. Its data is in the state folder."""
    config = load_config()
    running = _broker(config).start(port=_configured_port(config) if port is None else port)
    typer.echo(f"The development broker runs at {running.bootstrap} (process {running.pid}).")
    if running.bootstrap != config.kafka.bootstrap_servers:
        typer.echo(f"For other commands:  export ACCRUAL_KAFKA_BOOTSTRAP_SERVERS={running.bootstrap}")


@app.command(epilog="Example:  accrual broker stop")
def stop() -> None:
    """Stop the broker. Its data stays for the next start."""
    stopped = _broker(load_config()).stop()
    typer.echo("The development broker is stopped." if stopped else "The development broker does not run.")


@app.command(epilog="Example:  accrual broker status || accrual broker start")
def status() -> None:
    """Say whether the broker runs and answers; exit code 3 if it does not run, 1 if it runs and does not answer."""
    broker = _broker(load_config())
    running = broker.status()
    if running is None:
        typer.echo(f"The development broker in {broker.folder} does not run.")
        raise typer.Exit(3)
    try:
        wait_until_ready(running.bootstrap, timeout_s=5)
    except BrokerUnavailable as exc:
        raise BrokerSetupError(
            f"the development broker (process {running.pid}) runs and does not answer at {running.bootstrap};"
            f" {broker.log} says why"
        ) from exc
    typer.echo(f"The development broker runs at {running.bootstrap} (process {running.pid}).")


@app.command(epilog="Example:  accrual broker fetch   while there is a network, for a start without one")
def fetch() -> None:
    """Fetch Apache Kafka's jars, about 60 MB, if they are not there yet. `start` does it by itself."""
    typer.echo(f"Apache Kafka is in {ensure_jars(cache_dir())}.")


def _broker(config: Config) -> DevelopmentBroker:
    return DevelopmentBroker(config.state_dir / "broker")


def _configured_port(config: Config) -> int:
    """The port other commands will look for the broker at."""
    address = config.kafka.bootstrap_servers
    host, _, port = address.rpartition(":")
    if host not in (HOST, "localhost") or not port.isdecimal():
        raise BrokerSetupError(
            f"kafka.bootstrap_servers is {address}, and the development broker listens on {HOST} only:"
            f" set it to {HOST}:9092, or choose with --port"
        )
    return int(port)
