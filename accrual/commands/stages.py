"""The stages and the demo as commands: each replaces this process by the stage's own program."""

from __future__ import annotations

import importlib.util
import os
import sys

import typer

from accrual.errors import NotHere

# command: what it does, the module that does it, the arguments that say what.
STAGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "demo": ("Run the whole loop on real data, on this machine.", "examples.demo", ()),
    "join": ("Run a join worker: predictions and outcomes become ground truth.", "streams", ("worker",)),
    "monitor": ("Run the monitor of live quality.", "streams", ("monitor",)),
    "sink": ("Run a sink, which fills the lake.", "consumers", ("sink",)),
    "audit": ("Recompute the join from the raw events: do the books balance?", "consumers", ("audit",)),
    "windows": ("List the sealed windows.", "consumers", ("windows",)),
    "recall": ("List sealed windows that changed since, and the models made from them.", "consumers", ("recall",)),
    "canaries": ("Send rows that break rules, and see whether they are found.", "consumers", ("canaries",)),
    "train": ("Run the trainer: fine-tune, evaluate, gate, publish.", "trainer", ()),
    "models": ("Show what was trained: generations, verdicts, lineage, reports.", "trainer.models", ()),
}


def add_to(app: typer.Typer) -> None:
    """Add a command for every stage; `--help` and all other arguments go to the stage."""
    for name, (what, module, arguments) in STAGES.items():
        _add(app, name, what, module, arguments)


def _add(app: typer.Typer, name: str, what: str, module: str, arguments: tuple[str, ...]) -> None:
    @app.command(
        name,
        help=what,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def command(context: typer.Context) -> None:
        become(module, *arguments, *context.args)


def become(module: str, *arguments: str) -> None:
    """Replace this process by `python -m module arguments`, so that signals and exit code are the stage's own.

    Raises NotHere when only the SDK's wheel is installed.
    """
    if not _is_importable(module):
        raise NotHere(
            f"`{module}` is not part of the wheel: run this from a checkout after `make setup`, or from the image"
            " (see docker-compose.yml)"
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
