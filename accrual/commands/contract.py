"""`accrual contract`: check a contract before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrual.contract import CENSORED, Contract, load_contract

app = typer.Typer(
    help="Contracts: what a stream's events hold, what the label is, when it is final.", no_args_is_help=True
)


@app.command(epilog="Example:  accrual contract check schemas/contracts/credit-risk.yaml")
def check(
    files: Annotated[list[Path], typer.Argument(help="Contract files (YAML).", show_default=False)],
) -> None:
    """Check contracts and say what each means; an error names the file, the line, the field and the fix."""
    for path in files:
        typer.echo(f"{path}: fine. {_in_words(load_contract(path))}")


def _in_words(contract: Contract) -> str:
    expired = "has no label" if contract.on_expiry == CENSORED else f"is labeled '{contract.on_expiry}'"
    late = {
        "revise": "a later outcome still counts",
        "dead_letter": "a later outcome is a dead letter",
        "count": "a later outcome is kept and changes no label",
    }[contract.late]
    classes = f"{len(contract.output.classes)} classes" + (" and those to come" if contract.output.open else "")
    return (
        f"Stream '{contract.stream}': {len(contract.inputs)} inputs, {classes}; "
        f"the label is values.{contract.label.field}. "
        f"A prediction without an outcome after {contract.horizon} {expired}; {late}. "
        f"A training cycle every {contract.training.window_rows} labeled rows."
    )
