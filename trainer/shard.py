"""Shard: a base that is too large for one process lies in parts while it trains, a part of each layer on every rank.

By torch's FSDP2 (Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277): the ranks send each other their parts of a layer
when a pass comes to it, and drop the others' when it has left. What learns is whole on every rank, and its gradients
are summed as they are without (`ranks.py`). The base is frozen, so no other gradient is sent.

To gather a layer is to wait for all ranks. So they go in step: each makes as many passes as any other, for nothing when
it has no rows of its own. And no pass is broken off and tried again: when memory runs out in the middle of one the
others wait for a layer that would never come, so the process ends, and theirs with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from accrual.contract import Contract
from accrual.encoder import Encoder
from accrual.errors import ConfigError
from accrual.generator import Generator
from accrual.layers import layers_of
from accrual.training_policy import Lora
from trainer.adapter import adapt
from trainer.ranks import Ranks


def check_shard(contracts: Mapping[str, Contract]) -> None:
    """Raises ConfigError when there is nothing to share layers with, or a contract has them in fewer bits."""
    for stream, contract in contracts.items():
        if contract.training.quantize is not None:
            raise ConfigError(f"{stream}: training.quantize and trainer.shard exclude each other: take one of them out")
    if Ranks().world == 1:
        raise ConfigError(
            "trainer.shard needs several processes, and this one is alone: torchrun --nproc-per-node 2 -m trainer"
        )


def shard(model: Any, device: torch.device) -> None:
    """Leave on this rank its part of each frozen layer, on the device. All ranks call it with the same adapted model.

    Embeddings, what is behind the last layer and all that learns stay whole, where they are.
    """
    layers, mesh = layers_of(model), init_device_mesh(device.type, (Ranks().world,))
    learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=learning)
    # The module that runs them has nothing to share; it lets torch gather the next layer while one is computed.
    runs = next(module for module in model.modules() if any(child is layers for child in module.children()))
    fully_shard(runs, mesh=mesh, ignored_params=set(runs.parameters()))


def make_whole(sharded: Encoder | Generator, base: Encoder | Generator, lora: Lora) -> None:
    """Take a fresh copy of the base in place of the one in parts, and over into it what that has learned."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    adapt(base, lora)
    set_peft_model_state_dict(base.model, get_peft_model_state_dict(sharded.model))
    sharded.model = base.model
