"""bf16 is taken where it is clearly faster and says the same, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch

from accrual.encoder import Encoder, base_folder
from trainer.precision import FASTER_BY, Step, choose_precision, timed


def step_that(seconds: float, loss: float) -> Step:
    """In fp32 it takes 0.1 s and its loss is 2."""
    return lambda dtype: (0.1, 2.0) if dtype is torch.float32 else (seconds, loss)


@pytest.mark.parametrize(
    ("seconds", "loss", "chosen", "why"),
    [
        (0.05, 2.01, torch.bfloat16, "100 ms in fp32 and 50 ms in bf16"),
        (0.0999, 2.0, torch.float32, "100 ms in bf16"),
        (0.1 / FASTER_BY + 1e-4, 2.0, torch.float32, "91 ms in bf16"),
        (0.9, 2.0, torch.float32, "900 ms in bf16"),
        (0.05, 2.2, torch.float32, "the loss is 2.2, not 2"),
        (0.05, math.nan, torch.float32, "the loss is nan, not 2"),
        (0.05, math.inf, torch.float32, "the loss is inf, not 2"),
    ],
)
def test_bf16_is_chosen_only_if_it_is_clearly_faster_and_says_the_same(
    seconds: float, loss: float, chosen: torch.dtype, why: str
) -> None:
    precision = choose_precision(step_that(seconds, loss))
    assert precision.dtype is chosen
    assert why in precision.reason


def test_a_loss_that_is_nothing_in_fp32_too_keeps_fp32() -> None:
    assert choose_precision(lambda dtype: (0.1 if dtype is torch.float32 else 0.01, math.nan)).dtype is torch.float32


def test_the_first_step_of_each_does_not_count_and_one_slow_step_decides_nothing() -> None:
    seconds = {torch.float32: iter([0.1, 0.1, 0.1, 0.1]), torch.bfloat16: iter([9.0, 0.4, 0.05, 0.06])}
    assert choose_precision(lambda dtype: (next(seconds[dtype]), 1.0)).dtype is torch.bfloat16


def test_slow_steps_are_tried_once() -> None:
    tried: list[torch.dtype] = []

    def step(dtype: torch.dtype) -> tuple[float, float]:
        tried.append(dtype)
        return 0.6, 1.0

    choose_precision(step)
    assert tried == [torch.float32, torch.bfloat16] * 2


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_the_base_model_is_trained_in_what_was_measured_to_be_faster_and_is_not_changed_by_it(device: str) -> None:
    encoder = Encoder.load(base_folder("minilm"), 32)
    top = list(encoder.model.encoder.layer[-1].to(device).requires_grad_().parameters())
    encoder.model.to(device)
    before = [parameter.detach().clone() for parameter in top]
    states = torch.randn(16, 12, encoder.model.config.hidden_size, generator=torch.Generator().manual_seed(1)).to(
        device
    )
    seen: list[torch.dtype] = []

    def loss_of() -> torch.Tensor:
        out = encoder.model.encoder(states).last_hidden_state
        seen.append(encoder.model.encoder.layer[-1].attention.self.query(states).dtype)
        return torch.nn.functional.cross_entropy(out.mean(1).float(), torch.arange(16, device=device))

    step = timed(loss_of, top, device)
    took: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}

    def noted(dtype: torch.dtype) -> tuple[float, float]:
        seconds, loss = step(dtype)
        took[dtype].append(seconds)
        return seconds, loss

    precision = choose_precision(noted)
    slow, fast = (min(took[dtype][1:]) for dtype in (torch.float32, torch.bfloat16))
    assert "the loss is" not in precision.reason
    assert precision.dtype is (torch.bfloat16 if slow >= FASTER_BY * fast else torch.float32)
    assert set(seen) == {torch.float32, torch.bfloat16}, "both were tried, and in the numbers they stand for"
    assert all(torch.equal(now, then) for now, then in zip(top, before, strict=True))
    assert all(parameter.grad is None for parameter in top)
