"""A base in parts: two processes, each with half of every layer, come to what processes with a whole one come to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from accrual.config import load_config
from accrual.contract import Contract, load_contracts
from accrual.encoder import Encoder, base_folder
from accrual.errors import ConfigError
from accrual.generator import Generator
from accrual.layers import layers_of
from accrual.training_policy import EarlyStopping
from tests.trainer.test_finetune import CLASSES, changed, digest, logits, rows
from trainer import adapter, finetune, learner, loop
from trainer.checkpoint import digest_of
from trainer.finetune import fine_tune
from trainer.finetune_text import fine_tune_text
from trainer.probe import weighted_loss
from trainer.ranks import Ranks
from trainer.shard import check_shard, make_whole

ROWS = 21
OPTIONS = {"epochs": 1, "accumulate": 8, "early_stopping": EarlyStopping(share=0.2, patience=2)}
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
    frozen = [p for layer in layers_of(model) for p in layer.parameters() if not p.requires_grad]
    here = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return sum(p.numel() for p in here) / sum(p.numel() for p in frozen)


def small_batches(patch: pytest.MonkeyPatch) -> None:
    """Some passes of frozen layers more on one rank than on the other; batches to learn from with a row of one only."""
    patch.setattr(adapter, "batch_tokens", lambda _device: 60)
    patch.setattr(loop, "batches", lambda lengths: [[row] for row in range(len(lengths))])


def train_both(address: str, rank: str) -> None:
    """What each of two processes runs: both models on a whole base, and on one in parts."""
    dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=2)
    small_batches(pytest.MonkeyPatch())
    made = [[encoder(sharded), generator(sharded)] for sharded in (False, True)]
    print(msgspec.json.encode(made).decode(), flush=True)


def run_short_of_memory(address: str, rank: str) -> None:
    """What each of two processes runs where the second has memory for one row at a time."""
    dist.init_process_group("gloo", init_method=address, rank=int(rank), world_size=2)
    if rank == "1":
        learner.weighted_loss = crowded  # type: ignore[assignment]
    encoder(sharded=True)


def crowded(logits: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    if len(logits) > 1:
        raise MemoryError
    return weighted_loss(logits, *given)


def two_processes(what: str) -> list[tuple[int, str]]:
    """Run one of this file's functions in each; their exit codes, and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    program = f"import sys; from tests.trainer.test_shard import {what}; {what}(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, rank],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, one) for process, one in zip(running, said, strict=True)]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes: several threads of one computation wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_with_half_a_base_each_two_processes_come_to_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    small_batches(monkeypatch)
    alone = encoder(sharded=False), generator(sharded=False)
    for _, said in two_processes("train_both"):
        for one, whole, parts in zip(alone, *msgspec.json.decode(said, type=list[list[Report]]), strict=True):
            assert (one.share, whole.share) == (1, 1)
            assert parts.share == pytest.approx(0.5)
            assert parts.digest == whole.digest, "the same weights, bit by bit"
            np.testing.assert_allclose(parts.said, whole.said, atol=1e-5)
            np.testing.assert_allclose(parts.said, one.said, atol=0.02)


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_ends_both() -> None:
    """The other one does not wait for a layer that will never come."""
    assert [code for code, _ in two_processes("run_short_of_memory")] == [1, 1]


def test_what_a_process_without_rows_computes_is_counted_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows among three processes: the third goes along for two passes of the others."""
    base, passes = Encoder.load(base_folder("minilm"), 32), list[int]()
    base.model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(Ranks, "mine", lambda _self, _rows: [])
    monkeypatch.setattr(Ranks, "most", lambda _self, number: number + 2)
    _, vectors = finetune._frozen(base, base.tokenize(rows(2)[0]), 5, True, "fp32")
    assert len(passes) == 2
    assert not vectors.any()


def test_a_base_cannot_be_shared_by_one_process_or_in_fewer_bits() -> None:
    contracts = load_contracts(CONTRACTS)
    with pytest.raises(ConfigError, match="needs several processes"):
        check_shard(contracts)
    with pytest.raises(ConfigError, match=r"support-intents: .* exclude each other"):
        check_shard({"support-intents": in_four_bits(contracts["support-intents"])})


def in_four_bits(contract: Contract) -> Contract:
    return msgspec.structs.replace(contract, training=msgspec.structs.replace(contract.training, quantize="4bit"))


def test_the_configuration_says_whether_it_is_shared() -> None:
    assert not load_config({}).trainer.shard
    shared = load_config({"ACCRUAL_TRAINER_SHARD": "true"})
    assert load_config(shared.environment()).trainer.shard
