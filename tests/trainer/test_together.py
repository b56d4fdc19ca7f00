"""Several processes as one trainer: one of them is the trainer, the others take part and end with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.trainer.world import World


@pytest.mark.slow
def test_two_processes_train_and_judge_as_one_trainer(world: World) -> None:
    for _ in range(2):
        world.seal()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What torchrun sets for the processes that it starts.
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", "--once"],
            env={**os.environ, **world.config.environment(), **group, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    runs, _, generations = world.said()
    assert [(run.version, run.state, run.windows) for run in runs] == [(1, "trained", [1, 2])]
    assert [generation.version for generation in generations] == [0]
    assert "epoch 1" in said[0] and "epoch 1" in said[1], "both trained"
