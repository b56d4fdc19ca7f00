"""`python -m trainer`: the trainer process (also `accrual train`)."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from accrual.cli import run
from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.errors import ConfigError, LakeUnavailable, StoreUnavailable, Terminal, Transient

if TYPE_CHECKING:
    from trainer.cycle import Trainer

log = logging.getLogger("trainer")

LOOK_EVERY_S = 1.0
LONGEST_PAUSE_S = 30.0
NICE = 5  # capture and serving go first


def main(
    stream: Annotated[
        list[str] | None, typer.Option(help="Train this stream only; may be given several times. Default: all.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Take every step that can be taken now, then end.")] = False,
    now: Annotated[
        bool,
        typer.Option("--now", help="Train the --stream now, whatever its triggers say, then go on as with --once."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done first and why, and do nothing.")
    ] = False,
) -> None:
    """Run the trainer: wait for sealed windows, fine-tune, judge on the next window, publish what earned it.

    \b
    Examples:
      accrual train                             run until stopped, all streams
      accrual train --stream credit-risk        one stream
      accrual train --once                      what can be done now, for a scheduler
      accrual train --once --dry-run            what that would be, and why
      torchrun --nproc-per-node 2 -m trainer    several processes share each training
      accrual train --now --stream credit-risk  by hand: a challenger now, whatever the triggers say
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, _leave)
    os.nice(NICE)
    config = load_config()
    contracts = load_contracts(Path(config.contracts))
    for name in stream or []:
        if name not in contracts:
            raise ConfigError(f"--stream {name}: there are contracts for {', '.join(contracts)}")
    if now and not stream:
        raise ConfigError("--now needs --stream: say which one is to be trained")
    first = int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK") == "0"
    if dry_run:
        if first:
            _foretell(config, contracts, stream or list(contracts), now)
    elif not first:
        _take_part()
    else:
        keep_training(config, contracts, stream or list(contracts), once or now, now)
        _dismiss()


def keep_training(
    config: Config, contracts: Mapping[str, Contract], streams: Sequence[str], once: bool, now: bool = False
) -> None:
    """Take one step after another. What a retry may heal is waited out, loudly.

    A stream with something broken that a person must mend, its champion's bundle or its base model, is tried again and
    again, as loudly, and holds up no other one; with `once` that ends the process when the others are through.
    `now`: each stream is asked to be trained, whatever its triggers say.
    """
    pause = LOOK_EVERY_S
    trainer: Trainer | None = None
    broken: Exception | None = None
    while True:
        moved, broken = False, broken if once else None
        try:
            if trainer is None:
                trainer = _make_trainer(config, contracts)
                for name in streams if now else ():
                    trainer.ask_for(name)
            for name in streams:
                try:
                    moved |= trainer.next_step(name)
                except StoreUnavailable as exc:  # of this stream: another needs less room
                    broken = exc
                    log.error("%s waits: %s", name, exc)
                except Transient:
                    raise
                except Exception as exc:
                    broken = exc
                    log.error("%s cannot go on: %s", name, exc, exc_info=not isinstance(exc, Terminal))
            pause = LOOK_EVERY_S if broken is None else min(2 * pause, LONGEST_PAUSE_S)
        except Transient as exc:
            moved = False
            if once:
                raise
            if not isinstance(exc, LakeUnavailable):
                trainer = None  # the ledger is read anew: what was said last may or may not be there
                pause = min(2 * pause, LONGEST_PAUSE_S)
                log.error("%s; again in %.0f s", exc, pause)
            else:
                log.info("%s", exc)
        if once and not moved:
            if broken is not None:
                raise broken
            return
        if not moved:
            time.sleep(pause)


def _foretell(config: Config, contracts: Mapping[str, Contract], streams: Sequence[str], now: bool) -> None:
    from trainer.dry_run import foretell
    from trainer.publish import Said

    said = Said()
    said.read(config)
    for name in streams:
        typer.echo(foretell(config, said, contracts[name], now))


def _take_part() -> None:
    """Be one of several processes that train together, and not the one that is the trainer."""
    from trainer.challenger import take_part
    from trainer.ranks import join, leave

    join()
    take_part()
    leave()
    _end()


def _dismiss() -> None:
    """Tell the processes that train together with this one that there is no more to do."""
    from trainer.ranks import Ranks, leave

    ranks = Ranks()
    ranks.shared(None)
    leave()
    if ranks.world > 1:
        _end()


def _end() -> None:
    """End at once. Of several processes, a thread of torch's was seen to abort one that ended by and by."""
    logging.shutdown()
    os._exit(0)


def _make_trainer(config: Config, contracts: Mapping[str, Contract]) -> Trainer:
    from trainer.cycle import Trainer  # brings torch: after the errors that need no waiting
    from trainer.publish import Ledger
    from trainer.ranks import join

    join()
    return Trainer(config, contracts, Ledger(config))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """Leave at once: every step can be broken off anywhere and taken again."""
    _end()


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(main)
    run(lambda: app(prog_name="accrual train"))
