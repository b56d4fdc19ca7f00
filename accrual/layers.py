"""Layers: a model's stack of them, and passes that begin in the middle of it.

The layers below the lowest adapted one give the same with the adapter and without it, and do not change while it
learns. So what they give is computed once, and a pass goes on from there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from accrual.errors import TrainingFailed


class Entering:
    """The states of a batch that enter a layer, [rows, longest, dimensions]."""

    states: torch.Tensor


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The model's stack of layers: the module list that is as long as the configuration says the model is deep.

    Raises TrainingFailed when there is none.
    """
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise TrainingFailed(f"no stack of {depth} layers in {type(model).__name__}: this base cannot be adapted by layer")


def first_adapted(model: Any) -> int:
    """The number of the lowest layer that has a part of an adapter, or a copy that learns in its stead."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    of_adapter = BaseTunerLayer, AuxiliaryTrainingWrapper
    return next(
        number
        for number, layer in enumerate(layers_of(model))
        if any(isinstance(module, of_adapter) for module in layer.modules())
    )


@contextmanager
def watching(model: Any, layer: int) -> Iterator[Entering]:
    """While it lasts each pass leaves the states that entered a layer in `states`."""
    seen = Entering()

    def keep(_: Any, given: tuple[Any, ...]) -> None:
        seen.states = given[0]

    hook = layers_of(model)[layer].register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def starting_at(model: Any, first: int, recompute: bool = False) -> Iterator[Entering]:
    """While it lasts the model skips the layers below `first` and goes on from `states`.

    `recompute`: the layers from there on keep only their inputs and are computed again for the gradient (gradient
    checkpointing, Chen et al. 2016, arXiv:1604.06174): less memory, a third more time.
    """
    begin, stack = Entering(), layers_of(model)
    below, above = list(stack)[:first], list(stack)[first:]
    for i, layer in enumerate(below):
        stack[i] = _Pass(layer)
    hook = stack[first].register_forward_pre_hook(lambda _, given: (begin.states, *given[1:]))
    if recompute:
        for layer in above:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield begin
    finally:
        hook.remove()
        for i, layer in enumerate(below):
            stack[i] = layer
        if recompute:
            for layer in above:
                del layer.forward  # the class's own shows again


class _Pass(torch.nn.Module):
    """Stands where a layer was: hands on the states, and is like the layer in what else it is asked."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not as a module of its own: its parameters must not be found here
        # DeBERTa's layers return the attention too.
        self._with_attention = "tuple" in str(inspect.signature(type(layer).forward).return_annotation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (states, None) if self._with_attention else states
