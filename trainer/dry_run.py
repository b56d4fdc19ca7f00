"""Dry run: says what `accrual train --once` would do first for a stream, and why; it does none of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

from accrual.config import Config
from accrual.contract import Contract, load_contract
from accrual.lake import open_lake
from accrual.ledger import Generation
from accrual.predictor import Predictor
from trainer.evaluate import Scored, check_contract, score_window
from trainer.plan import check_ledger, gather, plan_of, rises_of
from trainer.publish import Said
from trainer.select import LAKE_MEMORY, Window, sealed_windows, select
from trainer.triggers import Facts

_NAMED = {"calibrate": "to calibrate"}


def foretell(config: Config, said: Said, contract: Contract, by_hand: bool) -> str:
    """A few lines for a person. Raises LakeUnavailable, LedgerLost, ContractError where the contract has changed too
    much, and BundleError where the champion cannot be scored.
    """
    stream = contract.stream
    if (champion := said.champion(stream)) is not None:
        check_contract(champion.model, load_contract(config.model_store / champion.bundle / "contract.yaml"), contract)
    with open_lake(config, memory=LAKE_MEMORY) as lake:
        if champion is None:
            check_ledger(lake, stream)
        windows = sealed_windows(lake, stream)

        def scored(champion: Generation, now: Window) -> Scored:
            return score_window(config, contract, Predictor.load(config.model_store / champion.bundle, config), now)

        def facts_of(new: Sequence[Window]) -> Facts:
            rises = partial(rises_of, said, stream, scored)
            return gather(lake, said, contract, windows, new, rises)

        plan = plan_of(said, contract, windows, facts_of, datetime.now(UTC), by_hand)
    if plan.step == "wait":
        return f"{stream}: would wait: {plan.reason}"
    if plan.step == "judge":
        return f"{stream}: would judge: {plan.reason}"
    with open_lake(config, at_snapshot=plan.windows[-1].snapshot_id, memory=LAKE_MEMORY) as lake:
        selection = select(lake, contract, plan.windows, contract.training.seed)
    numbers = ", ".join(str(window.window) for window in plan.windows)
    counts = ", ".join(f"{count:,} {_NAMED.get(what, what)}" for what, count in selection.counts.items() if count)
    return (
        f"{stream}: would train {stream}@{said.next_version(stream)} on window {numbers}, set off by {plan.reason}\n"
        f"  rows: {counts}"
    )
