"""`python -m trainer.models`: every generation with what made it and how it did (also `accrual models ...`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import track

from accrual.cli import run
from accrual.commands.rows import Format, check_file, print_rows, printable
from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.errors import ConfigError, NotFound
from accrual.lake import Lake, open_lake
from trainer.generations import Candidate, candidate, candidates, champions, lineage
from trainer.model_card import evaluated
from trainer.report import ranges, render

if TYPE_CHECKING:
    from trainer.matrix import Matrix

_T = TypeVar("_T")

app = typer.Typer(
    name="models",
    help="Models: every generation, what made it, how it was judged, and against which other.",
    epilog="Example:  accrual models list --stream support-intents",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Model = Annotated[str, typer.Argument(help="A model as predictions name it: stream@version.", show_default=False)]
_Stream = Annotated[str | None, typer.Option("--stream", help="Only this stream.")]
_Format = Annotated[Format, typer.Option("--format", help="How to print them.")]


@app.command(
    "list", epilog="Examples:  accrual models list   |   accrual models list --stream credit-risk --format json"
)
def list_(stream: _Stream = None, form: _Format = Format.TABLE) -> None:
    """List all models: published, rejected, failed and waiting, with the gain that was measured."""
    config = load_config()
    if stream is not None:
        _contract(config, stream)
    with open_lake(config) as lake:
        known = candidates(lake, stream)
    if not known:
        of = f" of {stream}" if stream else ""
        raise NotFound(f"the lake knows no model{of} yet; the trainer publishes generation 0 when it starts")
    _print_list(known, form)


def _print_list(known: Sequence[Candidate], form: Format) -> None:
    figure = _signed if form is Format.TABLE else _rounded
    in_service = {one.stream: one.model for one in champions(known)}
    rows = [
        {
            "model": one.model,
            "state": "in service" if one.model == in_service.get(one.stream) else one.state,
            "parent": one.run.parent if one.run else None,
            "windows": ranges(one.run.windows) if one.run else "-",
            "rows": one.run.rows_new + one.run.rows_replayed if one.run else 0,
            "judged": ranges([trial.challenger.window for trial in one.trials]),
            "gain": figure(one.gain),
            "over 0": figure(one.gain_over_0),
            "seconds": round(one.run.seconds, 1) if one.run else None,
        }
        for one in known
    ]
    print_rows(form, list(rows[0]), rows, "gain: Brier score below the champion's a row, and below generation 0's")


@app.command(epilog="Example:  accrual models show support-intents@3")
def show(model: _Model) -> None:
    """Show one model: its run, each window that judged it, and what its bundle says made it."""
    config = load_config()
    with open_lake(config) as lake:
        one = candidate(candidates(lake), model)
    for name, value in _facts(config, one).items():
        typer.echo(f"{name + ':':18}{printable(str(value))}")
    if one.trials:
        told_apart = "rank_correlation" if one.trials[0].challenger.rank_correlation is not None else "auroc"
        fields = [
            "window",
            "model",
            "role",
            "rows",
            "outside",
            "accuracy",
            told_apart,
            "brier",
            "log_loss",
            "ece",
            "e_value",
        ]
        print_rows(
            Format.TABLE,
            fields,
            (
                {name: _rounded(getattr(e, name)) for name in fields[:-1]} | {"e_value": _short(e.e_value)}
                for trial in one.trials
                for e in trial.all
            ),
            "outside: rows whose label is none of the model's classes",
        )


@app.command(epilog="Example:  accrual models card support-intents@3 > README.md")
def card(model: _Model) -> None:
    """Print a model's card, in the form of the Hugging Face hub: what made it, and what each window measured of it."""
    config = load_config()
    with open_lake(config) as lake:
        one = candidate(candidates(lake), model)
    folder = config.model_store / (one.bundle or "")
    if one.bundle is None or not folder.is_dir():
        raise NotFound(f"{model} has no bundle in {config.model_store}: its card is written with that")
    typer.echo(evaluated((folder / "README.md").read_text(encoding="utf-8"), one.model, one.trials), nl=False)


@app.command(epilog="Example:  accrual models compare support-intents@3 support-intents@0")
def compare(first: _Model, second: _Model, form: _Format = Format.TABLE) -> None:
    """Compare two models of a stream on the held-out rows of every sealed window: rows neither learned from."""
    if first == second:
        raise ConfigError(f"{first} is to be compared with itself: name two models")
    config = load_config()
    with open_lake(config) as lake:
        known = candidates(lake)
        two = [candidate(known, first), candidate(known, second)]
        if two[0].stream != two[1].stream:
            raise ConfigError(f"{first} and {second} are models of different streams: their rows are not the same")
        made = _matrix(config, _contract(config, two[0].stream), lake, two)
    rows = [
        {
            "window": window,
            "rows": made.rows[j],
            first: _rounded(made.brier[0][j]),
            second: _rounded(made.brier[1][j]),
            "gain": _signed(made.brier[1][j] - made.brier[0][j]),
            "learned by": ", ".join(m for m, row in zip(made.models, made.learned, strict=True) if row[j]) or None,
        }
        for j, window in enumerate(made.windows)
    ]
    columns = ["window", "rows", first, second, "gain", "learned by"]
    print_rows(form, columns, rows, f"Brier score on held-out rows; gain: {first} below {second}")


@app.command("lineage", epilog="Examples:  accrual models lineage support-intents@3")
def lineage_(model: _Model, form: _Format = Format.TABLE) -> None:
    """Show from which champions, windows and rows a model came, back to generation 0."""
    with open_lake(load_config()) as lake:
        line = lineage(candidates(lake), model)
    rows = [
        {
            "model": one.model,
            "windows": ranges(one.run.windows) if one.run else "-",
            "snapshot": one.run.snapshot_id if one.run else None,
            "new": one.run.rows_new if one.run else 0,
            "replayed": one.run.rows_replayed if one.run else 0,
            "published": f"{one.published.published_at:%Y-%m-%d %H:%M:%S}" if one.published else one.state,
            "digest": (one.bundle or "")[:12],
        }
        for one in line
    ]
    print_rows(form, list(rows[0]), rows, "newest first; its bundle's rows.parquet names every row it learned from")


@app.command("matrix", epilog="Examples:  accrual models matrix --stream support-intents --json matrix.json")
def matrix_(
    stream: Annotated[str, typer.Option("--stream", help="The stream.")],
    json: Annotated[Path | None, typer.Option(help="Write the whole matrix to this file.")] = None,
) -> None:
    """Score every published generation on the held-out rows of every window: transfer and forgetting."""
    config = load_config()
    contract = _contract(config, stream)
    if json is not None:
        check_file(json)
    with open_lake(config) as lake:
        made = _matrix(config, contract, lake, champions(candidates(lake, stream)))
    if not made.windows:
        raise NotFound(f"no sealed window of {stream} holds a held-out row yet")
    columns = ["model", *(str(window) for window in made.windows)]
    rows = (
        dict(zip(columns, [name, *(f"{value:.3f}" for value in values)], strict=True))
        for name, values in zip(made.models, made.brier, strict=True)
    )
    print_rows(Format.TABLE, columns, rows, "Brier score on held-out rows, by window")
    for name in _TRANSFERS:
        value = getattr(made, name)
        typer.echo(f"{name.replace('_', ' ') + ':':20}{'-' if value is None else f'{value:+.4f}'}")
    if json is not None:
        figures = msgspec.to_builtins(made) | {name: getattr(made, name) for name in _TRANSFERS}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(figures)))


@app.command(epilog="Example:  accrual models report support-intents@3 --to generation-3.html")
def report(
    model: _Model, to: Annotated[Path, typer.Option("--to", help="The HTML file to write.", show_default=False)]
) -> None:
    """Write a page about a model: how it was judged, what it fixed and broke, what it still gets wrong."""
    from trainer.examine import examine_last_window

    check_file(to)
    config = load_config()
    with open_lake(config) as lake:
        known = candidates(lake)
        one = candidate(known, model)
        of_stream = [other for other in known if other.stream == one.stream]
        contract = _contract(config, one.stream)
        examined = examine_last_window(config, contract, lake, of_stream, one) if one.trials else None
        made = _matrix(config, contract, lake, champions(of_stream))
    to.write_text(render(one, of_stream, examined, made), encoding="utf-8")
    typer.echo(f"{to}: open it in a browser.")


@app.command("backtest", epilog="Example:  accrual models backtest --stream credit-risk --to backtest")
def backtest_(
    stream: Annotated[str, typer.Option("--stream", help="The stream.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="A new folder for models and reports.", show_default=False)],
) -> None:
    """Go through the sealed windows again, as the trainer would have, and publish nothing.

    It trains what the contract would have had trained, so it takes as long. Change a copy of the contracts, name it by
    ACCRUAL_CONTRACTS, and see what the change would have been worth.
    """
    from trainer.backtest import afterwards, apart, backtest
    from trainer.examine import examine_last_window

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = apart(load_config(), to)
    contract = _contract(config, stream)
    known = backtest(config, contract, lambda windows: _tracked(windows, "windows"))
    after = afterwards(config, contract, known)
    (to / "backtest.json").write_bytes(msgspec.json.format(msgspec.json.encode({"models": known, "afterwards": after})))
    with open_lake(config) as lake:
        for one in known:
            if one.trials:
                page = render(one, known, examine_last_window(config, contract, lake, known, one), None)
                (to / f"{one.model}.html").write_text(page, encoding="utf-8")
    _print_list(known, Format.TABLE)
    if after:
        rows = [
            {
                "model": one.model,
                "instead of": one.replaced,
                "windows": ranges(one.windows),
                "rows": one.rows,
                "gain": f"{one.gain:+.4f} ({one.low:+.4f} to {one.high:+.4f})",
                "calibration error": f"{one.calibration_error:.4f}, was {one.replaced_calibration_error:.4f}",
            }
            for one in after
        ]
        print_rows(Format.TABLE, list(rows[0]), rows, "On the windows after those that judged it, with 95% interval")
    for one in known:
        if one.state == "failed" and one.run is not None:
            typer.echo(f"{one.model} failed: {one.run.reason}")
    pages = "and a page of each model that was judged" if any(one.trials for one in known) else "no model was judged"
    typer.echo(f"{to}: backtest.json; {pages}.")


@app.command(epilog="Example:  accrual models rebuild support-intents@3")
def rebuild(model: _Model) -> None:
    """Make a model again from what its manifest names. Exit code 1, with what has changed, if it is not the same."""
    from trainer.rebuild import rebuild as again

    config = load_config()
    with open_lake(config) as lake:
        one = candidate(candidates(lake), model)
    if not one.bundle:
        raise NotFound(f"{model} was never frozen: there is nothing to compare with")
    made = again(config, one.bundle)
    if made.digest == one.bundle:
        typer.echo(f"{model}: the same digest, {made.digest}")
        return
    for what in made.changed:
        typer.echo(f"changed: {what}")
    typer.echo(f"{model}: " + (f"another digest, {made.digest}" if made.digest else "not made again"))
    raise typer.Exit(1)


_TRANSFERS = ("gain", "backward_transfer", "forward_transfer", "forgetting")


def _contract(config: Config, stream: str) -> Contract:
    contracts = load_contracts(Path(config.contracts))
    if stream not in contracts:
        raise ConfigError(f"stream {stream}: there are contracts for {', '.join(contracts)}")
    return contracts[stream]


def _matrix(config: Config, contract: Contract, lake: Lake, models: Sequence[Candidate]) -> Matrix:
    """On the windows that are sealed now, each as it was then. Progress on stderr."""
    from trainer.matrix import matrix
    from trainer.select import sealed_windows

    if not models:
        raise NotFound("no model of this stream is published yet")
    windows = sealed_windows(lake, contract.stream)
    return matrix(config, contract, models, windows, lambda models: _tracked(models, "scoring"))


def _tracked(several: Sequence[_T], what: str) -> Iterable[_T]:
    """The same, with a bar on stderr for whoever watches."""
    console = Console(stderr=True)
    return track(several, what, console=console, transient=True, disable=not console.is_terminal)


def _facts(config: Config, one: Candidate) -> Mapping[str, Any]:
    from accrual.bundle import read_manifest

    facts: dict[str, Any] = {"model": one.model, "state": one.state}
    if one.run:
        facts |= {
            "why": one.run.reason,
            "made to replace": one.run.parent,
            "windows": ranges(one.run.windows),
            "rows": f"{one.run.rows_new} new, {one.run.rows_replayed} replayed",
            "cost": _cost(one),
        }
    if one.published:
        facts["published"] = f"{one.published.published_at:%Y-%m-%d %H:%M:%S} UTC"
    if one.bundle:
        folder = config.model_store / one.bundle
        facts["bundle"] = folder
        if folder.is_dir():
            manifest = read_manifest(folder)
            facts |= {
                "base": f"{manifest.base} ({manifest.base_digest or 'none needed'})",
                "snapshot": manifest.snapshot_id,
                "rows digest": manifest.rows_digest or "-",
                "retention": manifest.kept or "-",
                "seed": manifest.seed,
                "made with": ", ".join(f"{name} {version}" for name, version in manifest.made_with.items()),
            }
    return facts


def _cost(one: Candidate) -> str:
    if one.run is None or one.watt_hours is None:
        return "not known"
    return f"{one.run.seconds:.1f} s, {one.run.cpu_seconds:.1f} CPU s, about {one.watt_hours:.2g} Wh"


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.4f}"


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run(lambda: app(prog_name="accrual models"))
