"""Ranks: the processes that share one training, by torch.distributed; a process alone is a world of one.

A row belongs to one rank, by its number. Each rank computes the gradient of its rows of a batch, and their sum is what
one process would have computed, so the number of processes changes the weights by rounding only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=365)  # the other ranks wait for a training as long as the trainer waits for a window
Message = TypeVar("Message")


def join() -> Ranks:
    """Join the group that torchrun or `accelerate launch` began, if this process is one of several; its place there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    return Ranks()


def leave() -> None:
    """Leave the group, if this process is in one: its threads must have ended before the process does."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """This process's place among those that train together."""

    def __init__(self) -> None:
        self._together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._together else 0
        self.world = dist.get_world_size() if self._together else 1

    def shared(self, message: Message | None) -> Message | None:
        """What rank 0 gives; every rank calls it and has it then."""
        box = [message]
        if self._together:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def mine(self, rows: Sequence[int]) -> list[int]:
        """The rows among these that this rank computes."""
        return [row for row in rows if row % self.world == self.rank]

    def most(self, number: int) -> int:
        """The largest of the numbers that the ranks give. All ranks call it."""
        numbers = [number] * self.world
        if self._together:
            dist.all_gather_object(numbers, number)
        return max(numbers)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in one message. All ranks call it, with the same shapes."""
        if not self._together:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
