"""Parallel: one training spread over several processes, by torch.distributed.

    torchrun --nproc-per-node 2 -m trainer

The first process is the trainer. The others wait for it to begin a training, take their part of every batch, and add
up their gradients with it; all of them then have the same weights. They know neither Kafka nor the lake.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=365)  # the others wait as long as the trainer waits for a window


def join_group() -> None:
    """Join the group of processes that torchrun or `accelerate launch` started, if this is one of several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)


def rank() -> int:
    """The number of this process; the trainer is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(message: Any) -> Any:
    """What the trainer's process gives; every process gets it."""
    if size() == 1:
        return message
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
