"""Checkpoints: where a training stands, in one safetensors file, so that a killed one goes on instead of starting
again.

The file holds what is trained, the optimizer's moments and the position. It holds no state of a random generator: an
epoch's order is a function of seed and epoch, and nothing else draws. A file is whole or not there: it is written under
another name, synced and renamed. `key` is a digest of all that the training depends on, so that a file of other rows,
another contract or another version is foreign.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trainer.ranks import Ranks

log = logging.getLogger(__name__)

Position = TypeVar("Position", bound=msgspec.Struct)


class Checkpoint:
    """One training's file. A full disk costs the checkpoint, not the training."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def save(self, tensors: Mapping[str, torch.Tensor], position: msgspec.Struct) -> None:
        """Replace the file. What the disk refuses is logged, and the file of before stays."""
        held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        header = {
            "key": self._key,
            "position": msgspec.json.encode(position).decode(),
            "digest": digest_of(held),
        }
        draft = self._path.with_suffix(".draft")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                file.write(save(held, header))
                file.flush()
                os.fsync(file.fileno())
            draft.rename(self._path)
        except OSError as exc:
            log.warning("no checkpoint, the training goes on: %s: %s", self._path, exc.strerror)
            _drop(draft)

    def load(self, position: type[Position]) -> tuple[dict[str, torch.Tensor], Position] | None:
        """What was saved last under this key; None where there is nothing, or what is there cannot be trusted."""
        if not self._path.is_file():
            return None
        try:
            with safe_open(self._path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as exc:
            log.warning("%s is torn and ignored: %s", self._path, exc)
            return None
        if header.get("key") != self._key:
            log.warning("%s is of another training and ignored", self._path)
            return None
        if header.get("digest") != digest_of(tensors):
            log.warning("%s is altered and ignored", self._path)
            return None
        return tensors, msgspec.json.decode(header["position"], type=position)


def checkpoint_of(path: Path | None, model: torch.nn.Module, *content: Any) -> Checkpoint | None:
    """The checkpoint in a file, if there is one to be kept, of the training that depends on the model's weights as they
    are and on all else that is given.
    """
    return None if path is None else Checkpoint(path, _key_of(model, *content))


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key_of(model: torch.nn.Module, *content: Any) -> str:
    versions = [version(name) for name in ("accrual", "peft", "torch", "transformers")]
    machine = [torch.get_num_threads(), Ranks().world]
    encoded = msgspec.json.encode([*content, digest_of(model.state_dict()), versions, machine])
    return hashlib.sha256(encoded).hexdigest()


def _drop(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the next checkpoint writes over it
