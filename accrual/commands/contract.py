"""`accrual contract`: check a contract before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accrual.config import load_config
from accrual.contract import CENSORED, Contract, load_contract, load_contracts
from accrual.contract_change import breaking_changes
from accrual.errors import ConfigError, ContractError
from accrual.label_rule import Label
from accrual.registry import incompatibilities, register, schemas_of
from accrual.training_policy import OBSERVED_WARNING

app = typer.Typer(
    help="Contracts: what a stream's events hold, what the label is, when it is final.", no_args_is_help=True
)


@app.command(
    epilog="Examples:  accrual contract check schemas/contracts/credit-risk.yaml"
    "   |   accrual contract check new/credit-risk.yaml --against schemas/contracts"
)
def check(
    files: Annotated[list[Path], typer.Argument(help="Contract files (YAML).", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(help="The version before, a file or a folder of contracts: refuse what would break its stream."),
    ] = None,
) -> None:
    """Check contracts and say what each means; an error names the file, the line, the field and the fix."""
    before = {} if against is None else _versions_before(against)
    for path in files:
        contract = load_contract(path)
        if old := before.get(contract.stream):
            breaking = breaking_changes(old, contract)
            if breaking:
                raise ContractError(f"{path}: breaks stream '{contract.stream}':\n  " + "\n  ".join(breaking))
        elif against is not None:
            typer.echo(f"{path}: stream '{contract.stream}' is not in {against}: nothing to compare with")
        if (registry := load_config().registry.url) and (problems := incompatibilities(registry, contract)):
            raise ContractError(f"{path}: the Schema Registry refuses it:\n  " + "\n  ".join(problems))
        typer.echo(f"{path}: fine. {_in_words(contract)}")
        if contract.training.cohort == "observed":
            typer.secho(f"{path}: warning: {OBSERVED_WARNING}", fg=typer.colors.YELLOW, err=True)


@app.command("register", epilog="Example:  accrual contract register schemas/contracts/credit-risk.yaml")
def register_(files: Annotated[list[Path], typer.Argument(help="Contract files (YAML).", show_default=False)]) -> None:
    """Put the schemas of contracts into the Schema Registry (`registry.url`), as the latest versions."""
    registry = load_config().registry.url
    if not registry:
        raise ConfigError("registry.url is not set: write it into accrual.toml, or set ACCRUAL_REGISTRY_URL")
    for path in files:
        contract = load_contract(path)
        register(registry, contract)
        typer.echo(f"{path}: registered as {', '.join(schemas_of(contract))}")


def _versions_before(path: Path) -> dict[str, Contract]:
    if path.is_dir():
        return load_contracts(path)
    contract = load_contract(path)
    return {contract.stream: contract}


def _in_words(contract: Contract) -> str:
    expired = "has no label" if contract.on_expiry == CENSORED else f"is labeled '{contract.on_expiry}'"
    late = {
        "revise": "a later outcome still counts",
        "dead_letter": "a later outcome is a dead letter",
        "count": "a later outcome is kept and changes no label",
    }[contract.late]
    joined = (
        ""
        if contract.join is None
        else (
            f"An outcome belongs to {'the latest prediction' if contract.join.to == 'latest' else 'all predictions'}"
            f" made for its {contract.join.by} before it. "
        )
    )
    hidden = [name for name, field in {**contract.inputs, **contract.outcome.values}.items() if field.pii]
    if contract.join is not None and contract.join.pseudonymise:
        hidden.append(contract.join.by)
    output = contract.output
    classes = f"{len(output.classes)} classes" + (" and those to come" if output.open else "")
    says = {
        "classification": classes,
        "multilabel": f"any of {classes}",
        "ranking": "the choice between two texts",
        "score": "a score in [0, 1]",
        "text": f"a text of at most {output.max_new_tokens} tokens",
        "thumbs": "whether a text that was written is liked",
        "preference": "which of two texts that were written is preferred",
    }[output.task]
    return (
        f"Stream '{contract.stream}': {len(contract.inputs)} inputs, {says}; "
        f"the label is {_label_in_words(contract.label)}. {joined}"
        f"A prediction without an outcome after {contract.horizon} {expired}; {late}. "
        f"Windows of {contract.training.window_rows} labeled rows; a training cycle {_trained_in_words(contract)}."
        + (f" Hidden before it is sent: {', '.join(hidden)}." if hidden else "")
    )


def _trained_in_words(contract: Contract) -> str:
    triggers = contract.training.triggers
    given = [name for name in ("rows", "every", "drift", "decline", "recalled") if getattr(triggers, name) is not None]
    return f"when one of its triggers says so ({', '.join(given)})" if given else "on each"


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
