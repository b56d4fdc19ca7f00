"""The adapter: low-rank maps beside the linear maps of the top layers, by PEFT (Hu et al. 2021, arXiv:2106.09685).

The layers below never change, so what they make of a row is computed once and kept (`frozen_states`), and an epoch
costs the top layers only (`starting_at`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from accrual.contract import Lora
from accrual.encoder import Encoder, batches

log = logging.getLogger(__name__)


class TrainingFailed(Exception):
    """The run cannot give a model; the message says why. A recorded result, not a crash."""


def first_adapted(encoder: Encoder, lora: Lora) -> int:
    """The lowest layer that gets an adapter, counted from 0. Raises TrainingFailed for a model without such layers."""
    return max(0, len(layers_of(encoder.model)) - lora.layers)


def adapt(encoder: Encoder, lora: Lora, start: Path | None = None) -> None:
    """Put an adapter into the encoder, and let nothing but it learn.

    It is new and changes nothing yet or, with `start`, the one in that folder, if that has the same shape: then
    training goes on from it. Raises TrainingFailed if the contract's `lora.targets` or `lora.modules_to_save` are not
    there.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    first = first_adapted(encoder, lora)
    wanted = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=_targets(encoder.model, first, lora.targets),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    _check_saved(encoder.model, lora.modules_to_save)
    if start is not None:
        known = PeftConfig.from_pretrained(str(start))
        if _shape(known) == _shape(wanted):
            encoder.model = PeftModel.from_pretrained(encoder.model, str(start), is_trainable=True).eval()
            return
        log.warning("the champion's adapter has another shape than the contract's: training starts from the base")
    encoder.model = get_peft_model(encoder.model, wanted).eval()  # dropout off; the adapter learns all the same


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The model's stack of layers: the module list that is as long as the configuration says the model is deep."""
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise TrainingFailed(f"no stack of {depth} layers in {type(model).__name__}: this base cannot be adapted by layer")


class Beginning:
    """The states that the next batch starts from, in place of what the frozen layers would compute."""

    states: torch.Tensor


@contextmanager
def starting_at(stack: torch.nn.ModuleList, first: int) -> Iterator[Beginning]:
    """While it lasts the model skips the layers below `first` and goes on from the beginning's `states`."""
    begin = Beginning()
    frozen = [stack[i] for i in range(first)]
    for i in range(first):
        stack[i] = _Pass()
    hook = stack[first].register_forward_pre_hook(lambda _module, given: (begin.states, *given[1:]))
    try:
        yield begin
    finally:
        hook.remove()
        for i, layer in enumerate(frozen):
            stack[i] = layer


def frozen_states(
    encoder: Encoder, tokens: Sequence[Sequence[int]], first: int, keep: bool
) -> tuple[list[torch.Tensor] | None, torch.Tensor]:
    """What enters layer `first` of each row, [tokens, dimensions], if it is to be kept; and the rows' vectors."""
    entering: list[torch.Tensor] = []
    hook = layers_of(encoder.model)[first].register_forward_pre_hook(
        lambda _module, given: entering.append(given[0]) if keep else None
    )
    states: list[torch.Tensor] = [torch.empty(0)] * len(tokens) if keep else []
    vectors = torch.empty(len(tokens), encoder.model.config.hidden_size)
    try:
        with torch.no_grad():
            for rows in batches([len(t) for t in tokens]):
                vectors[rows] = encoder.pooled([tokens[i] for i in rows])
                if keep:
                    batch = entering.pop()
                    for at, row in enumerate(rows):
                        states[row] = batch[at, : len(tokens[row])].clone()
    finally:
        hook.remove()
    return states if keep else None, vectors


class _Pass(torch.nn.Module):
    """Stands where a frozen layer was."""

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return states


def _targets(model: Any, first: int, names: Sequence[str]) -> list[str]:
    """The linear maps from layer `first` on; with `names` those that are called so, by the last part of their name."""
    within = {id(module) for layer in list(layers_of(model))[first:] for module in layer.modules()}
    linear = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and id(module) in within
    ]
    found = [name for name in linear if not names or name.rpartition(".")[2] in names]
    if not found:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise TrainingFailed(f"lora.targets: none of {', '.join(names)} in these layers; there are {', '.join(there)}")
    return found


def _check_saved(model: Any, names: Sequence[str]) -> None:
    there = {name for name, _ in model.named_modules()}
    for name in names:
        if not any(known == name or known.endswith(f".{name}") for known in there):
            raise TrainingFailed(f"lora.modules_to_save: the base model has no module '{name}'")


def _shape(config: Any) -> tuple[Any, ...]:
    """What two adapters must have in common for one to go on from the other."""
    saved = sorted(config.modules_to_save or ())
    return config.r, sorted(config.target_modules), saved, config.use_rslora, config.use_dora
