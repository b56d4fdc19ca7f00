"""Fine-tuning: the same weights whatever happens on the way; memory that runs out, losses that jump, new classes."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from accrual.contract import EarlyStopping, Lora, Training
from accrual.encoder import Encoder, base_folder, batches
from trainer import finetune
from trainer.adapter import TrainingFailed
from trainer.finetune import Start, Tuned, fine_tune
from trainer.freeze import _write_adapter

ROOT = Path(__file__).parents[2]
BANKING = ROOT / "examples" / "data" / "banking77" / "train.csv"
CLASSES = ["card_arrival", "exchange_rate", "lost_or_stolen_card", "top_up_failed"]
TRAINING = Training(template="", epochs=2, max_tokens=16, learning_rate=5e-3, lora=Lora(rank=2, alpha=4, layers=1))

# Trains on the base in argv[1] with a checkpoint in argv[2], and writes a digest of the weights to argv[3].
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import msgspec
from trainer import parallel
from tests.trainer.test_finetune import TRAINING, digest, encoder, rows, CLASSES
from trainer.finetune import fine_tune
import torch
torch.set_num_threads(1)
parallel.join_group()
training = msgspec.structs.replace(TRAINING, epochs=6, checkpoint_every=3)
texts, labels = rows(200)
tuned = fine_tune(encoder(Path(sys.argv[1])), texts, labels, CLASSES, training, 3, None, None, Path(sys.argv[2]))
if parallel.rank() == 0:
    Path(sys.argv[3]).write_text(digest(tuned))
"""


def rows(count: int, classes: Sequence[str] = CLASSES) -> tuple[list[str], list[str]]:
    """The first rows of these classes, mixed."""
    with BANKING.open(encoding="utf-8", newline="") as file:
        known = [(row["text"], row["category"]) for row in csv.DictReader(file) if row["category"] in classes]
    random.Random(1).shuffle(known)
    return [text for text, _ in known[:count]], [label for _, label in known[:count]]


def encoder(base: Path) -> Encoder:
    return Encoder.load(base, 16, base_folder("minilm"))


def digest(tuned: Tuned) -> str:
    """Of all weights that were trained."""
    from peft import get_peft_model_state_dict

    found = hashlib.sha256(tuned.weight.tobytes() + tuned.bias.tobytes())
    for name, tensor in sorted(get_peft_model_state_dict(tuned.encoder.model).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def adapter_of(tuned: Tuned) -> np.ndarray:
    from peft import get_peft_model_state_dict

    return np.concatenate(
        [t.numpy().ravel() for _, t in sorted(get_peft_model_state_dict(tuned.encoder.model).items())]
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with random weights: what is tested here depends on no knowledge, and it trains in a second."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("base")
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    return folder


def tuned(base: Path, training: Training = TRAINING, count: int = 200, **more: object) -> Tuned:
    texts, labels = rows(count)
    return fine_tune(encoder(base), texts, labels, CLASSES, training, 3, **more)  # type: ignore[arg-type]


def start(base: Path, program: Path, out: Path, **env: str) -> subprocess.Popen[bytes]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    argv = [sys.executable, str(program), str(base), str(out.with_suffix(".safetensors")), str(out)]
    return subprocess.Popen(argv, env=variables, cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(PROGRAM.format(root=str(ROOT)))
    return path


@pytest.mark.slow
def test_killed_at_any_moment_training_ends_with_the_same_weights(base: Path, program: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(base, program, whole).wait() == 0
    checkpoint, chance, kills = killed.with_suffix(".safetensors"), random.Random(2), 0
    while not killed.exists():
        process, seen = start(base, program, killed), checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        # Only once it came further than the one before: kills at the start would prove nothing.
        while process.poll() is None:
            if kills < 4 and checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen:
                time.sleep(chance.uniform(0, 0.05))
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills >= 2, "it was killed while it trained"
    assert killed.read_text() == whole.read_text()


@pytest.mark.slow
def test_two_processes_reach_what_one_reaches(base: Path, program: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = program.read_text().replace(
        "write_text(digest(tuned))", "write_bytes(tuned.weight.tobytes() + tuned.bias.tobytes())"
    )
    program.write_text(script)
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(base, program, one).wait() == 0
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(base, program, two, RANK=str(rank), **group) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    alone, together = (np.frombuffer(path.read_bytes(), np.float32) for path in (one, two))
    np.testing.assert_allclose(together, alone, atol=2e-3)


def test_a_checkpoint_of_something_else_or_a_torn_one_is_not_used(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    every_step = msgspec.structs.replace(TRAINING, checkpoint_every=1)
    expected = digest(tuned(base, every_step))
    tuned(base, every_step, count=100, checkpoint=path)
    assert digest(tuned(base, every_step, checkpoint=path)) == expected, "other rows"
    path.write_bytes(path.read_bytes()[:1000])
    assert digest(tuned(base, every_step, checkpoint=path)) == expected, "torn"
    path.write_bytes(b"")
    assert digest(tuned(base, every_step, checkpoint=path)) == expected, "empty"


def test_a_checkpoint_is_gone_on_from(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = tmp_path / "c.safetensors", []
    training = msgspec.structs.replace(TRAINING, checkpoint_every=1, early_stopping=EarlyStopping())
    expected = digest(tuned(base, training))
    step = finetune._Loop._step

    def broken_off(loop: object, own: list[int], position: finetune.Position) -> float:
        steps.append(position.steps)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(loop, own, position)  # type: ignore[arg-type]

    monkeypatch.setattr(finetune._Loop, "_step", broken_off)
    with pytest.raises(KeyboardInterrupt):
        tuned(base, training, checkpoint=path)
    assert digest(tuned(base, training, checkpoint=path)) == expected
    assert steps[:5] == [0, 1, 2, 3, 3] and steps[4:] == list(range(3, len(steps) - 1)), "no step was done twice"


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, largest = tuned(base), []
    pooled = Encoder.pooled

    def small(self: Encoder, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        if torch.is_grad_enabled():
            largest.append(len(tokens))
            if len(tokens) > 10:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        return pooled(self, tokens)

    monkeypatch.setattr(Encoder, "pooled", small)
    found = tuned(base)
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-3)
    np.testing.assert_allclose(adapter_of(found), adapter_of(expected), atol=1e-3)
    assert largest[-1] <= 10 < largest[0] and sum(n > 10 for n in largest) <= 4, "what fits is remembered"


def test_a_row_that_does_not_fit_into_memory_is_a_recorded_failure(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = Encoder.pooled

    def never(self: Encoder, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise MemoryError
        return pooled(self, tokens)

    monkeypatch.setattr(Encoder, "pooled", never)
    with pytest.raises(TrainingFailed, match="out of memory on a single row"):
        tuned(base)


@pytest.mark.parametrize(("loss", "said"), [(float("nan"), "the loss is nan"), (1e4, "the loss jumped from")])
def test_a_loss_that_jumps_or_is_no_number_ends_the_run(
    base: Path, monkeypatch: pytest.MonkeyPatch, loss: float, said: str
) -> None:
    real, calls = finetune._Loop._gradients, []

    def gradients(loop: finetune._Loop, own: list[int]) -> float:
        calls.append(own)
        return loss if len(calls) == 8 else real(loop, own)

    monkeypatch.setattr(finetune._Loop, "_gradients", gradients)
    monkeypatch.setattr(finetune, "_SPIKE_AFTER", 5)
    monkeypatch.setattr(finetune, "batches", partial(batches, budget=256))
    with pytest.raises(TrainingFailed, match=said):
        tuned(base, msgspec.structs.replace(TRAINING, epochs=1))
    assert len(calls) == 8


def test_early_stopping_keeps_the_weights_that_were_best_on_later_rows(base: Path) -> None:
    texts, labels = rows(200)
    shifted = {name: CLASSES[(n + 1) % 4] for n, name in enumerate(CLASSES)}
    # What the later rows say is the opposite of the others: the more is learned, the worse.
    misled = labels[:160] + [shifted[label] for label in labels[160:]]
    stopping = EarlyStopping(share=0.2, patience=1)
    patient = msgspec.structs.replace(TRAINING, epochs=8, learning_rate=2e-2, early_stopping=stopping)
    stopped = fine_tune(encoder(base), texts, misled, CLASSES, patient, 3)
    apart = texts[160:]

    def loss(model: Tuned) -> float:
        said = model.logits(apart).astype(np.float64)
        said -= said.max(axis=1, keepdims=True)
        chance = np.exp(said) / np.exp(said).sum(axis=1, keepdims=True)
        return float(
            -np.log([row[CLASSES.index(label)] for row, label in zip(chance, misled[160:], strict=True)]).mean()
        )

    to_the_end = msgspec.structs.replace(patient, early_stopping=None)
    through = fine_tune(encoder(base), texts[:160], misled[:160], CLASSES, to_the_end, 3)
    assert loss(stopped) < loss(through) - 0.1


def test_a_step_of_several_batches_makes_fewer_steps(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = finetune._Loop._gradients

    def gradients(loop: finetune._Loop, own: list[int]) -> float:
        sizes.append(len(own))
        return real(loop, own)

    monkeypatch.setattr(finetune._Loop, "_gradients", gradients)
    tuned(base)
    single, sizes[:] = list(sizes), []
    tuned(base, msgspec.structs.replace(TRAINING, accumulate=3))
    assert sum(sizes) == sum(single) == 2 * 200
    assert len(sizes) == 2 * -(-len(single) // 2 // 3)


def test_training_goes_on_from_the_champion_and_a_new_class_loses_no_old_one(base: Path, tmp_path: Path) -> None:
    champion = tuned(base, msgspec.structs.replace(TRAINING, epochs=4))
    _write_adapter(tmp_path / "adapter", champion.encoder, "base")
    going_on = Start(tmp_path / "adapter", champion.weight, champion.bias)
    texts, labels = rows(120, [*CLASSES[:2], "age_limit"])
    barely = msgspec.structs.replace(TRAINING, epochs=1, learning_rate=1e-6)
    warm = fine_tune(encoder(base), texts, labels, CLASSES, barely, 3, start=going_on)
    assert warm.classes == [*CLASSES, "age_limit"]
    np.testing.assert_allclose(warm.weight[:4], champion.weight, atol=1e-3)
    np.testing.assert_allclose(adapter_of(warm), adapter_of(champion), atol=1e-3)
    said = np.array(warm.classes)[warm.logits(texts).argmax(axis=1)]
    assert (said[np.array(labels) == "age_limit"] == "age_limit").any()

    other_shape = msgspec.structs.replace(barely, lora=Lora(rank=4, alpha=8, layers=1))
    cold = fine_tune(encoder(base), texts, labels, CLASSES, other_shape, 3, start=going_on)
    assert adapter_of(cold).shape != adapter_of(champion).shape


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            Lora(targets=["nothing"]),
            "lora.targets: none of nothing in these layers; there are dense, key, query, value",
        ),
        (Lora(modules_to_save=["absent"]), "the base model has no module 'absent'"),
    ],
)
def test_what_the_base_does_not_have_is_named(base: Path, lora: Lora, said: str) -> None:
    with pytest.raises(TrainingFailed, match=said):
        tuned(base, msgspec.structs.replace(TRAINING, lora=lora))


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=2, alpha=4, layers=1, targets=["query", "value"]),
        Lora(rank=2, alpha=4, layers=1, modules_to_save=["LayerNorm"]),
        Lora(rank=2, alpha=4, layers=1, rslora=True),
        Lora(rank=2, alpha=4, layers=1, dora=True),
    ],
)
def test_what_was_trained_is_what_is_served(base: Path, tmp_path: Path, lora: Lora) -> None:
    made = tuned(base, msgspec.structs.replace(TRAINING, lora=lora))
    _write_adapter(tmp_path / "adapter", made.encoder, "base")
    served = Encoder.load(base, 16, base_folder("minilm"), tmp_path / "adapter")
    texts, _ = rows(20)
    np.testing.assert_allclose(served.embed(texts), made.encoder.embed(texts), atol=1e-5)


def test_rows_too_many_to_keep_what_the_frozen_layers_made_of_them_train_the_same(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digest(tuned(base))
    monkeypatch.setattr(finetune, "CACHE_BYTES", 0)
    found = tuned(base)
    np.testing.assert_allclose(found.weight, tuned(base).weight, atol=1e-6)
    assert digest(found) == expected or np.allclose(adapter_of(found), adapter_of(tuned(base)), atol=1e-4)
