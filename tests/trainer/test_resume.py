"""A training that is killed goes on from its checkpoint and ends with the same weights, bit by bit; two processes that
share one come to what a process alone does.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from trainer.checkpoint import Checkpoint

# Says each step before it is taken, and at the end the digest of the weights and the logits of a row.
PROGRAM = """
import sys
from pathlib import Path
from test_finetune import changed, digest, logits, tune
from accrual.training_policy import EarlyStopping
from trainer import loop
import torch.distributed as dist

step = loop.Loop._step
def saying(self, groups, done):
    rows = [row for group in groups for row in group]
    print("step", self.position.epoch, self.position.step, *rows, flush=True)
    step(self, groups, done)
loop.Loop._step = saying
if len(sys.argv) > 2:
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[3]), world_size=2)
training = changed(epochs=4, checkpoint_steps=1, early_stopping=EarlyStopping(share=0.2, patience=4))
tuned = tune(training, 100, checkpoint=Path(sys.argv[1]) if sys.argv[1] else None)
print("digest", digest(tuned), *logits(tuned)[0].tolist(), flush=True)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}:{here}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def lines(process: subprocess.Popen[str]) -> list[list[str]]:
    with process:
        return [line.split() for line in process.communicate(timeout=120)[0].splitlines()]


@pytest.fixture(scope="module")
def undisturbed() -> list[list[str]]:
    return lines(start(""))


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_weights(undisturbed: list[list[str]], tmp_path: Path) -> None:
    """`kill -9` while a step is computed, twice; then it may finish. No row is seen twice in an epoch."""
    chance, checkpoint = random.Random(4), tmp_path / "run.safetensors"
    steps = [line for line in undisturbed if line[0] == "step"]
    taken: dict[str, list[str]] = {}
    for _ in range(2):
        process = start(str(checkpoint))
        with process:
            assert process.stdout is not None
            for _ in range(chance.randint(2, 4)):
                _, epoch, step, *rows = process.stdout.readline().split()
                taken[f"{epoch} {step}"] = rows
            process.kill()
    *rest, last = lines(start(str(checkpoint)))
    assert len(rest) < len(steps), "it began again from the start"
    assert last == undisturbed[-1]
    taken |= {f"{epoch} {step}": rows for _, epoch, step, *rows in rest}
    assert [taken[f"{line[1]} {line[2]}"] for line in steps] == [line[3:] for line in steps]
    for epoch in "0123":
        seen = [row for name, rows in taken.items() if name.startswith(epoch) for row in rows]
        assert sorted(map(int, seen)) == list(range(80))


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(undisturbed: list[list[str]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    both = [start("", address, rank) for rank in "01"]
    first, second = (lines(process)[-1] for process in both)
    assert first == second, "the ranks hold the same weights"
    alone = [float(value) for value in undisturbed[-1][2:]]
    np.testing.assert_allclose([float(value) for value in first[2:]], alone, atol=0.02)


class _At(msgspec.Struct):
    step: int


def test_a_checkpoint_is_read_back_as_it_was(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "deep" / "a.safetensors", "key")
    assert checkpoint.load(_At) is None
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(1.5)}
    checkpoint.save(tensors, _At(7))
    found = checkpoint.load(_At)
    assert found is not None
    assert found[1] == _At(7)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_a_torn_an_altered_and_a_foreign_checkpoint_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint = Checkpoint(path, "key")
    checkpoint.save({"a": torch.arange(100.0)}, _At(7))
    whole = path.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert checkpoint.load(_At) is None
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert checkpoint.load(_At) is None
    path.write_bytes(whole)
    assert Checkpoint(path, "another").load(_At) is None
    for said in ("is torn", "is altered", "is of another training"):
        assert said in caplog.text
    assert checkpoint.load(_At) is not None


def test_a_disk_that_refuses_costs_the_checkpoint_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    Checkpoint(tmp_path / "file" / "a.safetensors", "key").save({"a": torch.zeros(1)}, _At(1))
    assert "no checkpoint, the training goes on" in caplog.text
