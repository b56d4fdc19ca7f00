"""Checkpoints: where training stands, so that one that was killed goes on instead of beginning again.

One safetensors file: what is trained, the optimizer's state, and as its metadata the position and the key of everything
that training depends on. It is written beside and renamed, so there is a whole one or none; one that was made from
something else is not used.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

log = logging.getLogger(__name__)


class Position(msgspec.Struct, frozen=True):
    """`steps` are done, of which `in_epoch` are of epoch `epoch` (counted from 0). `loss`: their sum in this epoch.

    `best` and `bad`: of early stopping, the lowest loss so far and for how many epochs it was not reached again.
    """

    epoch: int = 0
    in_epoch: int = 0
    steps: int = 0
    loss: float = 0.0
    best: float | None = None
    bad: int = 0


def save_checkpoint(path: Path, key: str, position: Position, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write it, all or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    said = {"key": key, "position": msgspec.json.encode(position).decode()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, said)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)


def load_checkpoint(path: Path, key: str) -> tuple[Position, dict[str, torch.Tensor]] | None:
    """The checkpoint that was made from the same `key`, or None if there is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("key") != key:
                log.warning("%s was made from other rows, settings or code: training begins anew", path)
                return None
            position = msgspec.json.decode(said["position"], type=Position)
            return position, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, msgspec.DecodeError) as exc:
        log.warning("%s cannot be read (%s): training begins anew", path, exc)
        return None
