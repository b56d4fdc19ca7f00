"""A base in parts: two processes, each with half of every layer, come to what processes with a whole one come to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from accrual.config import load_config
from accrual.contract import Contract, EarlyStopping, load_contracts
from accrual.encoder import Encoder, base_folder
from accrual.errors import ConfigError
from accrual.generator import Generator
from tests.trainer.test_finetune import CLASSES, changed, digest, logits, rows
from trainer import adapter, learner, loop
from trainer.checkpoint import digest_of
from trainer.finetune import fine_tune
from trainer.finetune_text import fine_tune_text
from trainer.probe import weighted_loss
from trainer.shard import check_shard, make_whole

ROWS = 41
OPTIONS = {"epochs": 2, "accumulate": 16, "early_stopping": EarlyStopping(share=0.2, patience=2)}
CONTRACTS = Path(__file__).parents[2] / "schemas" / "contracts"


class Report(msgspec.Struct):
    """What a process says at its end: of the frozen layers' bytes those that it held while it trained, the digest of
    what it learned, and logits or losses of later rows by the model that it was left with.
    """

    share: float
    digest: str
    said: list[float]


def encoder(sharded: bool) -> Report:
    """Fine-tune the real base model on few rows."""
    training, (texts, labels) = changed(**OPTIONS), rows(ROWS)
    base = Encoder.load(base_folder("minilm"), 32)
    tuned = fine_tune(base, texts, labels, CLASSES, training, 17, sharded=sharded)
    share, learned = share_of(tuned.model.model), digest(tuned)
    if sharded:
        make_whole(tuned.model, Encoder.load(base_folder("minilm"), 32), training.lora)
        assert digest(tuned) == learned
    return Report(share, learned, logits(tuned).ravel().tolist())


def generator(sharded: bool) -> Report:
    """Fine-tune a small language model of no sense: four layers, the words in and out the same matrix."""
    training, (texts, labels) = changed(**OPTIONS, gradient_checkpointing=True), rows(ROWS)
    tuned = fine_tune_text(small_generator(), texts, labels, training, 17, sharded=sharded)
    share = share_of(tuned.model.model)
    learned = digest_of({name: p for name, p in tuned.model.model.named_parameters() if p.requires_grad})
    if sharded:
        make_whole(tuned.model, small_generator(), training.lora)
    later = tuned.model.written(*rows(12, since=ROWS))
    return Report(share, learned, tuned.model.log_losses(later)[0].tolist())


def small_generator() -> Generator:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = Encoder.load(base_folder("minilm"), 32).tokenizer
    words.eos_token = words.sep_token
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return Generator(LlamaForCausalLM(config).eval().requires_grad_(False), words, 32, 8)


def share_of(model: Any) -> float:
    """Of the frozen layers' bytes, those that are here."""
    frozen = [p for layer in adapter.layers_of(model) for p in layer.parameters() if not p.requires_grad]
    here = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return sum(p.numel() for p in here) / sum(p.numel() for p in frozen)


def take_part(sharded: str, memory: str, address: str, rank: str) -> None:
    """What each process runs. No batch has rows of both; but where `memory` is short, for more than one at a time."""
    if address:
        dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=2)
    adapter.batch_tokens = lambda _device: 60  # type: ignore[assignment]
    if memory == "enough":
        loop.batches = lambda lengths: [[row] for row in range(len(lengths))]  # type: ignore[assignment]
    elif rank == "1":
        learner.weighted_loss = crowded  # type: ignore[assignment]
    made = {"encoder": encoder(bool(sharded)), "generator": generator(bool(sharded))}
    print(msgspec.json.encode(made).decode(), flush=True)


def crowded(logits: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    if len(logits) > 1:
        raise MemoryError
    return weighted_loss(logits, *given)


def processes(count: int, sharded: str = "", memory: str = "enough") -> list[tuple[int, str]]:
    """Run so many; the exit code of each, and what it printed."""
    address = ""
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    program = "import sys; from tests.trainer.test_shard import take_part; take_part(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, sharded, memory, address, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, one) for process, one in zip(running, said, strict=True)]


def reports(count: int, sharded: str = "") -> list[dict[str, Report]]:
    """By model, of each process."""
    return [msgspec.json.decode(said, type=dict[str, Report]) for _, said in processes(count, sharded)]


@pytest.mark.slow
def test_with_half_a_base_each_two_processes_come_to_what_one_does() -> None:
    alone, whole, parts = reports(1), reports(2), reports(2, sharded="yes")
    for model in ("encoder", "generator"):
        assert [one[model].share for one in (*alone, *whole)] == [1, 1, 1]
        assert [one[model].share for one in parts] == pytest.approx([0.5, 0.5])
        for one in parts:
            assert one[model].digest == whole[0][model].digest, "the same weights, bit by bit"
            np.testing.assert_allclose(one[model].said, whole[0][model].said, atol=1e-5)
            np.testing.assert_allclose(one[model].said, alone[0][model].said, atol=0.02)


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_ends_both() -> None:
    """The other one does not wait for a layer that will never come."""
    assert [code for code, _ in processes(2, sharded="yes", memory="short")] == [1, 1]


def test_a_base_cannot_be_shared_by_one_process_or_in_fewer_bits() -> None:
    contracts = load_contracts(CONTRACTS)
    with pytest.raises(ConfigError, match="trainer.shard needs several processes"):
        check_shard(contracts)
    with pytest.raises(ConfigError, match="support-intents: training.quantize and trainer.shard exclude each other"):
        check_shard({"support-intents": in_four_bits(contracts["support-intents"])})


def in_four_bits(contract: Contract) -> Contract:
    return msgspec.structs.replace(contract, training=msgspec.structs.replace(contract.training, quantize="4bit"))


def test_the_configuration_says_whether_it_is_shared() -> None:
    assert not load_config({}).trainer.shard
    shared = load_config({"ACCRUAL_TRAINER_SHARD": "true"})
    assert load_config(shared.environment()).trainer.shard
