"""`accrual topics`: the topics on the broker."""

from __future__ import annotations

import typer

from accrual.config import load_config
from accrual.kafka import TopicNames, check_topics, create_topics, partition_counts

app = typer.Typer(help="Accrual's topics on the broker of kafka.bootstrap_servers.", no_args_is_help=True)


@app.command(epilog="Example:  ACCRUAL_TOPICS_PARTITIONS=12 accrual topics create")
def create() -> None:
    """Create the topics that are missing (topics.prefix, .partitions and .replication), then check them all."""
    created = create_topics(load_config())
    typer.echo(f"Created: {', '.join(created)}." if created else "All topics are there.")


@app.command("list", epilog="Example:  accrual topics list")
def list_() -> None:
    """List Accrual's topics with their partition counts; fails, naming the fix, when they do not fit together."""
    config = load_config()
    counts = partition_counts(config)
    for name in TopicNames(config.topics.prefix).settings(config.topics.partitions):
        typer.echo(f"{name:40} {counts.get(name, 'missing')}")
    check_topics(config)
