"""`accrual contract`: check a contract before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrual.contract import CENSORED, Contract, load_contract
from accrual.label_rule import Label

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
        f"the label is {_label_in_words(contract.label)}. "
        f"A prediction without an outcome after {contract.horizon} {expired}; {late}. "
        f"A training cycle every {contract.training.window_rows} labeled rows."
    )


def _label_in_words(label: Label) -> str:
    one = f"values.{label.field}" if label.field else f"`{label.expression}`"
    text = {
        "last": one,
        "first": f"{one} of the first outcome",
        "majority": f"what most outcomes say by {one}",
        "sum": f"by the sum of {one} over the outcomes",
    }[label.take]
    if label.sources:
        text += f", by the best source of {', '.join(label.sources)}"
    return text + (f", once {label.complete_when} outcomes count" if label.complete_when > 1 else "")
