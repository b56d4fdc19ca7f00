"""Several processes as one trainer: one of them is the trainer, the others take part and end with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from accrual.predictor import Predictor
from tests.trainer.world import World

TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
# `--multi_gpu` is how it starts several processes at all; each finds out by itself that there is no GPU.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "shard"), [(TORCHRUN, False), (ACCELERATE, True)], ids=["torchrun", "accelerate"])
def test_two_processes_train_and_judge_as_one_trainer(world: World, launcher: list[str], shard: bool) -> None:
    for _ in range(2):
        world.seal()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {**world.config.environment(), "ACCRUAL_TRAINER_SHARD": str(shard), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, port, "-m", "trainer", "--once"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    runs, _, generations = world.said()
    assert [(run.version, run.state, run.windows) for run in runs] == [(1, "trained", [1, 2])]
    assert [generation.version for generation in generations] == [0]
    assert ended.stderr.count("epoch 1") == 2, "both trained"
    learned = Predictor.load(world.config.model_store / str(runs[0].digest), world.config)
    texts, labels = zip(*world.rows[120:160], strict=True)
    assert np.mean(learned.judge(texts, labels).hits) > 0.9
