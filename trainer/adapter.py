"""The adapter: which parts of a base model learn, and what those give that do not.

The output of the layers below the adapted ones is computed once for each row and kept, on the device if it has the
room; an epoch costs the top `lora.layers` layers only (accrual/layers.py).
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from accrual.encoder import Encoder, batch_tokens, batches
from accrual.errors import StoreUnavailable, TrainingFailed
from accrual.generator import Generator
from accrual.layers import layers_of, watching
from accrual.training_policy import Lora
from trainer.memory import Budget
from trainer.precision import Precision, computing_in
from trainer.ranks import Ranks

log = logging.getLogger(__name__)

CACHE_BYTES = 1 << 29


def adapt(encoder: Encoder | Generator, lora: Lora) -> int:
    """Put a trainable low-rank adapter beside the linear maps of the top layers; the number of the lowest of these.

    It changes no output yet. Raises TrainingFailed when the base has no stack of layers, or a name in `lora` is that of
    nothing in the top layers.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    top = list(layers_of(encoder.model))[-lora.layers :]
    within = {id(module) for layer in top for module in layer.modules()}
    inside = {name: module for name, module in encoder.model.named_modules() if id(module) in within}
    linear = [name for name, module in inside.items() if isinstance(module, (torch.nn.Linear, Conv1D))]  # GPT-2's
    targets = _named("targets", lora.targets, linear) if lora.targets else linear
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        modules_to_save=_named("modules_to_save", lora.modules_to_save, list(inside)) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    encoder.model = get_peft_model(encoder.model, settings)
    encoder.model.eval()  # dropout off; that the adapters learn does not depend on it
    return max(0, len(layers_of(encoder.model)) - lora.layers)


def take_over(encoder: Encoder | Generator, adapter: Path) -> bool:
    """Make the fresh adapter do what a champion's does; False, with the reason logged, when it is of another shape.

    Raises TrainingFailed when the champion's cannot be read.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        theirs = load_file(adapter / "adapter_model.safetensors")
        factor = _scale(LoraConfig.from_pretrained(str(adapter))) / _scale(encoder.model.peft_config["default"])
    except (OSError, ValueError, TypeError, SafetensorError) as exc:
        raise TrainingFailed(f"{adapter}: the champion's adapter cannot be read: {exc}") from exc
    ours = get_peft_model_state_dict(encoder.model)
    if {name: tensor.shape for name, tensor in theirs.items()} != {name: tensor.shape for name, tensor in ours.items()}:
        log.warning(
            "training.start: the champion's adapter is of another shape than training.lora says: starts from base"
        )
        return False
    scaled = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in theirs.items()}
    set_peft_model_state_dict(encoder.model, scaled)
    return True


class States:
    """For each text of so many tokens the states that enter a layer, one behind the other: [tokens, dimensions].

    On a CUDA device if they take less than half of its free memory; elsewhere, if they are more than `CACHE_BYTES`,
    in a file that has no name. It is read and written, not mapped: what is mapped counts as this process's memory.
    Raises StoreUnavailable when the disk has no room for it.
    """

    def __init__(self, lengths: Sequence[int], dimensions: int, device: torch.device, mine: Sequence[int]) -> None:
        """`mine`: the texts that this rank keeps. Of others it may keep and give anything."""
        self._lengths = torch.tensor(lengths)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._dimensions = dimensions
        size = sum(lengths) * dimensions * 4
        on_device = device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2
        self._file: BinaryIO | None = None
        if not on_device and size > CACHE_BYTES:
            whole = len(mine) == len(lengths)
            self._file = _room([(0, size)] if whole else [self._span(row) for row in mine])
        where = device if on_device else torch.device("cpu")
        self._space = torch.empty(0 if self._file else sum(lengths), dimensions, device=where)

    def keep(self, rows: Sequence[int], states: torch.Tensor) -> None:
        """Take in the states of some rows, [rows, longest, dimensions]."""
        if self._file is None:
            places, real = self._places(rows)
            self._space[places[real]] = states[real.to(states.device)].to(self._space)
            return
        for row, of_row in zip(rows, states.float().cpu(), strict=True):
            written = of_row[: self._lengths[row]].contiguous().numpy()
            os.pwrite(self._file.fileno(), written.data, self._span(row)[0])

    def of(self, rows: Sequence[int]) -> torch.Tensor:
        """The states of some rows, [rows, longest, dimensions]. Behind a row's end its last one is repeated."""
        if self._file is None:
            return self._space[self._places(rows)[0]]
        lengths = self._lengths[torch.tensor(rows)].tolist()
        found = torch.empty(len(rows), max(lengths), self._dimensions)
        for row, length, of_row in zip(rows, lengths, found, strict=True):
            os.preadv(self._file.fileno(), [of_row[:length].numpy().data], self._span(row)[0])
            of_row[length:] = of_row[length - 1]
        return found

    def _span(self, row: int) -> tuple[int, int]:
        """Where a row is in the file: from which byte, and how many."""
        each = self._dimensions * 4
        return int(self._starts[row]) * each, int(self._lengths[row]) * each

    def _places(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the states of rows lie, [rows, longest], and which of these are within their row."""
        lengths = self._lengths[torch.tensor(rows)].unsqueeze(1)
        each = torch.arange(int(lengths.max())).unsqueeze(0)
        places = self._starts[torch.tensor(rows)].unsqueeze(1) + each.minimum(lengths - 1)
        return places.to(self._space.device), (each < lengths).to(self._space.device)


def frozen_states(
    model: Any,
    lengths: Sequence[int],
    mine: Sequence[int],
    first: int,
    forward: Callable[[list[int]], None],
    in_step: bool = False,
    precision: Precision = "fp32",
) -> States:
    """For each text of so many tokens the states that enter layer `first`, if it is among `mine`.

    `forward` passes some of the texts through the model, and does besides with the result what it likes. In step with
    other ranks (`shard.py`) it is called as often as on any of them: with texts of before again or, where none is
    `mine`, with the first of all.
    """
    states = States(lengths, model.config.hidden_size, model.device, mine)
    budget = Budget(batch_tokens(model.device), in_step)
    groups = [[mine[at] for at in group] for group in batches([lengths[text] for text in mine], budget.tokens)]
    if in_step:
        again = groups[0] if groups else [0]
        groups += [again] * (Ranks().most(len(groups)) - len(groups))
    with torch.no_grad(), computing_in(precision, model.device), watching(model, first) as seen:

        def compute(texts: list[int]) -> None:
            forward(texts)
            states.keep(texts, seen.states)

        for group in groups:
            budget.spend(group, lengths, compute)
    return states


def _room(spans: Sequence[tuple[int, int]]) -> BinaryIO:
    """A file without a name that has room for these bytes: a full disk is said before they are computed."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (kept open)
        for begin, size in spans:
            os.posix_fallocate(file.fileno(), begin, size)
    except OSError as exc:
        size = sum(size for _, size in spans)
        raise StoreUnavailable(
            f"the folder of temporary files has no room for {size / 2**30:.3g} GiB, which fine-tuning keeps of its "
            f"rows: {exc.strerror}. Name another folder by TMPDIR, or lower training.max_rows or training.max_tokens"
        ) from exc
    return file


def _scale(settings: Any) -> float:
    """What an adapter's product of two matrices is multiplied by."""
    return float(settings.lora_alpha / (math.sqrt(settings.r) if settings.use_rslora else settings.r))


def _named(option: str, wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The full names of the modules that end in one of `wanted`."""
    found: list[str] = []
    for end in wanted:
        of_this = [name for name in names if name == end or name.endswith(f".{end}")]
        if not of_this:
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise TrainingFailed(f"training.lora.{option}: '{end}' is nothing in the top layers; there are {ends}")
        found += of_this
    return found
