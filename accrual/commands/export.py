"""`accrual export`: a stream's ground truth as files for other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from accrual.commands.moments import Moment, moment, snapshot_of
from accrual.config import load_config
from accrual.errors import NotHere


class ExportFormat(StrEnum):
    """What is written."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    HF_DATASET = "hf-dataset"


def export(
    stream: Annotated[str, typer.Option(help="The stream whose ground truth is exported.")],
    to: Annotated[Path, typer.Option(help="The file that is written; with hf-dataset the folder.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="What is written.")] = ExportFormat.PARQUET,
    window: Annotated[int | None, typer.Option(help="Only this sealed window, as it was sealed.")] = None,
    at: Annotated[
        Moment | None,
        typer.Option("--at", parser=moment, metavar="SNAPSHOT|TIME", help="The lake as it was then."),
    ] = None,
    where: Annotated[str, typer.Option(metavar="SQL", help="Only rows for which this holds.")] = "true",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many rows and which columns; write none.")
    ] = False,
) -> None:
    """Write a stream's ground truth to files, inputs and values typed by its contract.

    `hf-dataset` is a folder of Parquet files with a card, which `datasets.load_dataset(FOLDER)` reads.
    """
    try:
        from accrual import lake_export
        from accrual.lake import open_lake
    except ModuleNotFoundError as exc:
        raise NotHere(f"`accrual export` needs DuckDB, and {exc.name} is missing: pip install 'accrual[lake]'") from exc
    if window is not None and at is not None:
        raise typer.BadParameter("a window names its snapshot itself: give --window or --at")
    if to.exists() and not (force or dry_run):
        raise typer.BadParameter(f"{to} is there already; --force replaces it")
    config = load_config()
    snapshot = snapshot_of(config, at)
    wanted = lake_export.Export(stream, where)
    if window is not None:
        with open_lake(config) as newest:
            sealed = lake_export.sealed_window(newest, stream, window)
        wanted, snapshot = lake_export.Export(stream, where, sealed), sealed.snapshot_id
    with open_lake(config, at_snapshot=snapshot) as lake:
        rows, schema = lake_export.shape_of(lake, wanted)
        if dry_run:
            typer.echo(f"{rows:,} rows would be written to {to}, with the columns")
            for field in schema:
                typer.echo(f"  {field.name}: {field.type}")
            return
        console = Console(stderr=True)
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
            task = progress.add_task("rows", total=rows)
            written = lake_export.write(lake, wanted, form.value, to, lambda n: progress.advance(task, n))
    typer.echo(f"{written:,} rows are in {to}")
