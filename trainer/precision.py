"""Precision: the numbers to train in, chosen by trying them and never by a default.

bf16 under autocast halves what a multiplication reads and may lose nothing. Where the processor has no units for it,
each multiplication is converted there and back and takes several times as long; and a model may need the digits that it
drops. Both are known after a few batches. Parameters, gradients and the optimizer's state stay in fp32.

The choice depends on the clock: who must make the same weights again takes it from the record of the first time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

FASTER_BY = 1.1  # less is not worth digits, and may be the clock's
LOSS_WITHIN = 0.02  # of fp32's loss: bf16 has 8 bits of a number, steps of 0.4%
TRIES = 3  # of each, after one that is not counted; the fastest is what the machine can do
ENOUGH_S = 1.0  # on all that is counted; one of each there always is

# What one step in these numbers took, in seconds, and its loss.
Step = Callable[[torch.dtype], tuple[float, float]]


class Precision(NamedTuple):
    """The numbers that a model's layers compute in while it is trained; `reason` is for people."""

    dtype: torch.dtype
    reason: str

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """What the forward pass is to run in, on a device of this type."""
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype is torch.bfloat16)


def choose_precision(step: Step) -> Precision:
    """bf16 if it is faster by `FASTER_BY` and its loss is finite and within `LOSS_WITHIN` of fp32's, else fp32.

    `step` computes the same in the numbers it is given and changes nothing: the two take turns.
    """
    for dtype in (torch.float32, torch.bfloat16):
        step(dtype)  # memory is mapped and kernels are chosen
    slow, fast = math.inf, math.inf
    spent = 0.0
    for _ in range(TRIES):
        (in_fp32, expected), (in_bf16, loss) = step(torch.float32), step(torch.bfloat16)
        if not math.isclose(loss, expected, rel_tol=LOSS_WITHIN):
            return Precision(torch.float32, f"fp32: in bf16 the loss is {loss:.4g}, not {expected:.4g}")
        slow, fast = min(slow, in_fp32), min(fast, in_bf16)
        spent += in_fp32 + in_bf16
        if spent >= ENOUGH_S:
            break
    found = f"a step takes {slow * 1000:.0f} ms in fp32 and {fast * 1000:.0f} ms in bf16"
    if slow >= fast * FASTER_BY:
        return Precision(torch.bfloat16, f"bf16: {found}")
    return Precision(torch.float32, f"fp32: {found}")


def timed(loss_of: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter], device: str) -> Step:
    """A step for `choose_precision`: `loss_of` forward and back to `parameters`; their gradients stay as they are."""

    def step(dtype: torch.dtype) -> tuple[float, float]:
        _finish(device)
        begun = time.perf_counter()
        with Precision(dtype, "").autocast(device):
            loss = loss_of()
        torch.autograd.grad(loss, parameters, allow_unused=True)
        _finish(device)
        return time.perf_counter() - begun, loss.item()

    return step


def _finish(device: str) -> None:
    """Wait for what the device was given: a GPU works on while Python goes ahead."""
    if device == "cuda":
        torch.cuda.synchronize()
