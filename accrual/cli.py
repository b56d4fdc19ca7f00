"""The `accrual` command: what every part of Accrual offers to a terminal.

Each group of commands is a file in `accrual/commands/`; nothing heavy is imported before the command that needs it.
Exit codes: 0 done, 1 an error that the one message on stderr explains, 2 wrong usage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version as installed_version

import typer

from accrual.commands import broker, contract, dead_letters, lake, pending, quarantine, settings, sql, stages, topics
from accrual.errors import AccrualError

app = typer.Typer(
    name="accrual",
    help="Joins what production models predicted with what really happened, and keeps the model learning from it.",
    epilog="Example:  accrual demo   runs the whole loop on real data, on this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(broker.app, name="broker")
app.add_typer(contract.app, name="contract")
app.add_typer(topics.app, name="topics")
app.add_typer(dead_letters.app, name="dead-letters")
app.add_typer(lake.app, name="lake")
app.add_typer(quarantine.app, name="quarantine")
app.command(epilog="Example:  accrual config")(settings.config)
app.command(
    epilog='Examples:  accrual sql "select status, count(*) from ground_truth group by all"   |   accrual sql --attach'
)(sql.sql)
app.command(
    epilog="Examples:  accrual pending --stream credit-risk --older-than 30d   |   accrual pending --format csv"
)(pending.pending)
stages.add_to(app)


@app.command(epilog="Example:  accrual version")
def version() -> None:
    """Print the version of Accrual."""
    typer.echo(installed_version("accrual"))


def run(command: Callable[[], object]) -> None:
    """Run a command line to its end; an AccrualError becomes one message on stderr and exit code 1."""
    try:
        command()
    except AccrualError as error:
        typer.secho(f"accrual: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def main() -> None:
    """Entry point of the `accrual` command."""
    run(app)
