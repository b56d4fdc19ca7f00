"""Fine-tuning on a CUDA device; skipped where there is none. They need no broker and no fixture of the project's.

python -m pytest --noconftest tests/trainer/test_gpu.py
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from accrual import scores
from accrual.encoder import Encoder, base_folder
from tests.trainer.test_finetune import CLASSES, FEW, rows, tune
from trainer import loop
from trainer.finetune import Tuned, fine_tune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LEARN = 120


def judged(tuned: Tuned) -> tuple[float, float]:
    """Accuracy and Brier score on later rows."""
    texts, labels = rows(150, since=LEARN)
    logits = torch.from_numpy(tuned.logits(texts))
    probabilities, truth = logits.softmax(1).numpy(), scores.indices_of(labels, CLASSES)
    return scores.accuracy(probabilities, truth), scores.brier(probabilities, truth)


@pytest.fixture(scope="module")
def on_cpu() -> tuple[float, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        return judged(tune(count=LEARN))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_it_learns_what_it_learns_on_a_cpu(on_cpu: tuple[float, float], precision: str) -> None:
    tuned = tune(msgspec.structs.replace(FEW, precision=precision), LEARN)
    assert tuned.model.device.type == "cuda"
    assert judged(tuned) == pytest.approx(on_cpu, abs=0.03)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_learned_on_fewer_bits_serves_on_the_base_as_it_is(
    on_cpu: tuple[float, float], bits: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    encoder = Encoder.load(base_folder("minilm"), 32, quantize=bits)  # type: ignore[arg-type]
    linear = [module for module in encoder.model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(module).__name__ for module in linear} == {"Linear4bit" if bits == "4bit" else "Linear8bitLt"}
    texts, labels = rows(LEARN)
    tuned = fine_tune(encoder, texts, labels, CLASSES, FEW, 17)
    tuned.model.model.save_pretrained(tmp_path)
    served = Encoder.load(base_folder("minilm"), 32, adapter=tmp_path)
    assert served.device.type == "cpu"
    assert judged(Tuned(served, tuned.classes, tuned.weight, tuned.bias)) == pytest.approx(on_cpu, abs=0.05)


def test_a_training_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often = msgspec.structs.replace(FEW, checkpoint_steps=1)
    whole = tune(often, LEARN)
    step, left = loop.Loop._step, 3

    def until_killed(self: loop.Loop, *given: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        step(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", until_killed)
        with pytest.raises(KeyboardInterrupt):
            tune(often, LEARN, checkpoint=tmp_path / "state")
    resumed = tune(often, LEARN, checkpoint=tmp_path / "state")
    np.testing.assert_allclose(resumed.weight, whole.weight, atol=1e-3)


def test_when_memory_runs_out_batches_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    options = msgspec.structs.replace(FEW, max_tokens=512)
    texts, labels = rows(90)
    encoder = Encoder.load(base_folder("minilm"), 512)
    encoder.model.to("cuda")
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (100 << 20)  # what a batch of 16,384 tokens does not fit into
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        tuned = fine_tune(encoder, [" ".join([text] * 30) for text in texts], labels, CLASSES, options, 17)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with" in caplog.text
    assert np.isfinite(tuned.weight).all()
