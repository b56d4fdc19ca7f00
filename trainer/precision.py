"""Precision: the number format in which a batch is computed, chosen by measurement. Weights and optimizer stay fp32."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch

from trainer.ranks import Ranks

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]

BATCHES = 3
FASTER = 1.5  # times: less is noise, and a choice that noise makes is another one next time
SAME_LOSS = 0.02  # relative


def choose(wanted: Literal["auto", "fp32", "bf16"], device: torch.device, loss_of: Callable[[], float]) -> Precision:
    """What `training.precision` says; `auto` tries both and takes bf16 where it is faster and its loss is the same.

    `loss_of` computes a batch forwards and backwards, changing nothing, and returns its loss. On a CPU without AMX
    nothing is measured: with AVX-512 a batch took 0.74 to 0.89 of its time in fp32, without it more, and the same
    rows and seed are to give the same weights.
    """
    if wanted != "auto":
        return wanted
    if not _is_fast(device):
        return "fp32"
    exact, seconds = _tried("fp32", device, loss_of)
    rounded, fewer = _tried("bf16", device, loss_of)
    better = seconds > FASTER * fewer and abs(rounded - exact) <= SAME_LOSS * abs(exact)
    log.info(
        "a batch takes %.1f ms in fp32, %.1f ms in bf16; loss %.4f, %.4f", 1e3 * seconds, 1e3 * fewer, exact, rounded
    )
    votes, ranks = torch.tensor([float(better)], device=device), Ranks()
    ranks.add_up([votes])  # the ranks compute parts of one sum: all in one format
    return "bf16" if votes.item() == ranks.world else "fp32"


def of_frozen(wanted: Literal["auto", "fp32", "bf16"]) -> Precision:
    """In which the layers below the adapter are computed, before anything can be tried."""
    return "bf16" if wanted == "bf16" else "fp32"


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which matrix products are computed in this format."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _tried(precision: Precision, device: torch.device, loss_of: Callable[[], float]) -> tuple[float, float]:
    """The loss, and the seconds of the quickest batch after one to warm up."""
    quickest = float("inf")
    with computing_in(precision, device):
        loss = loss_of()
        for _ in range(BATCHES):
            started = time.perf_counter()
            loss = loss_of()  # a float: the device has finished
            quickest = min(quickest, time.perf_counter() - started)
    return loss, quickest


def _is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported())
