"""`accrual config`: the configuration as every stage reads it."""

from __future__ import annotations

import msgspec
import typer

from accrual.config import load_config


def config() -> None:
    """Print the configuration: defaults, then accrual.toml, then ACCRUAL_* variables.

    Values that may be secrets (kafka.client, the catalog's address, pii.key) are shown as set or not.
    """
    loaded = load_config()
    for section, value in msgspec.to_builtins(loaded).items():
        if not isinstance(value, dict):
            typer.echo(f"{section} = {value!r}")
            continue
        for key, setting in value.items():
            secret = (section, key) in {("kafka", "client"), ("lake", "catalog"), ("pii", "key")} and setting
            typer.echo(f"{section}.{key} = {'(set)' if secret else repr(setting)}")
    typer.echo(f"state folder: {loaded.state_dir}")
    typer.echo(f"lake data: {loaded.lake_data}")
    typer.echo(f"model store: {loaded.model_store}")
