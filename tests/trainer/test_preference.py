"""Learning from judgements: of one text whether it was liked, of two which was preferred.

The model is tiny and its weights are random; the tokenizer is a real one. Real data are in test_tasks.py.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from accrual import reward
from accrual.contract import Text
from accrual.encoder import base_folder
from accrual.errors import TrainingFailed
from accrual.generator import Generator
from accrual.layers import first_adapted, layers_of
from accrual.training_policy import Lora, Training
from trainer.adapter import adapt
from trainer.checkpoint import Checkpoint
from trainer.finetune_preference import TunedPreference, fine_tune_preference
from trainer.freeze import write_adapter
from trainer.loop import Loop

THUMBS, SIDES = ["down", "up"], ["first", "second"]
OPTIONS = Training(
    template="{a}", completions=["{b}"], beta=0.5, epochs=6, learning_rate=0.03, max_tokens=96, lora=Lora(layers=1)
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two small layers, as a folder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    words = AutoTokenizer.from_pretrained(base_folder("smollm2"))
    torch.manual_seed(1)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=4, **shape)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def fresh(base: Path) -> Generator:
    return Generator.load(base, 96, 32)


def replies(rows: int) -> tuple[list[Text], list[str]]:
    """People like replies that say please, whatever was asked."""
    rng = np.random.default_rng(rows)
    liked = rng.random(rows) < 0.6
    asked = [f"ask {rng.integers(100)}" for _ in range(rows)]
    said = [f"{'please look' if like else 'go away'} {rng.integers(100)}" for like in liked]
    return list(zip(asked, said, strict=True)), ["up" if like else "down" for like in liked]


def pairs(rows: int) -> tuple[list[Text], list[str]]:
    """Of two replies people prefer the one that says please."""
    rng = np.random.default_rng(rows)
    chosen = rng.choice(SIDES, rows)
    made = []
    for side in chosen:
        good, bad = f"please look {rng.integers(100)}", f"go away {rng.integers(100)}"
        made.append((f"ask {rng.integers(100)}", *((good, bad) if side == "first" else (bad, good))))
    return made, [str(side) for side in chosen]


def tune(base: Path, rows: list[Text], labels: list[str], checkpoint: Path | None = None) -> TunedPreference:
    classes = THUMBS if len(rows[0]) == 2 else SIDES
    return fine_tune_preference(fresh(base), rows, labels, classes, OPTIONS, 3, checkpoint=checkpoint)


def probability(logits: np.ndarray) -> np.ndarray:
    """Of the second class."""
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


@pytest.mark.parametrize(("make", "second"), [(replies, "up"), (pairs, "second")])
def test_what_was_learned_foretells_later_judgements(base: Path, make: object, second: str) -> None:
    rows, labels = make(120)  # type: ignore[operator]
    later, theirs = make(60)  # type: ignore[operator]
    said = probability(tune(base, rows, labels).logits(later))
    happened = np.array([label == second for label in theirs])
    assert said[happened].min() > said[~happened].max()
    assert np.square(said - happened).mean() < 0.12, "half of what the share alone costs"


def test_without_an_adapter_all_texts_are_alike(base: Path) -> None:
    rows, _ = pairs(5)
    bias = np.array([0.0, 0.3], dtype=np.float32)
    generator = fresh(base)
    assert np.allclose(reward.logits_of(generator, rows, 0.1, bias), np.tile(bias, (5, 1)))
    adapt(generator, OPTIONS.lora)  # which changes nothing yet
    assert np.allclose(reward.logits_of(generator, rows, 0.1, bias), np.tile(bias, (5, 1)), atol=1e-6)


def test_the_reward_is_the_log_ratio_of_model_and_base(base: Path) -> None:
    rows, labels = pairs(40)
    tuned = tune(base, rows, labels)
    texts = reward.written(tuned.model, rows[:4])
    assert [tuned.model.tokenizer.decode(text.tokens[text.start : -1]) for text in texts[:2]] == list(rows[0][1:])
    with torch.inference_mode():
        own = tuned.model.log_likelihoods(texts)
        by_base = fresh(base).log_likelihoods(texts)
    ratios = (own - by_base).numpy().reshape(4, 2)
    expected = OPTIONS.beta * (ratios[:, 1] - ratios[:, 0]) + tuned.bias[1]
    assert np.allclose(tuned.logits(rows[:4])[:, 1], expected, atol=1e-3)
    assert np.abs(ratios).max() > 0.1, "it has learned something"


def test_the_first_loss_is_that_of_the_shares(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows, labels = replies(64)
    share = (labels.count("up") + 1) / 66
    with caplog.at_level("INFO"):
        one = fine_tune_preference(
            fresh(base),
            rows,
            labels,
            THUMBS,
            Training(template="", epochs=1, learning_rate=1e-9, lora=Lora(layers=1)),
            3,
        )
    assert one.bias[1] == pytest.approx(math.log(share / (1 - share)), abs=1e-5)
    counted = -np.mean([math.log(share if label == "up" else 1 - share) for label in labels])
    assert f"loss {counted:.4f}" in caplog.text


def test_rows_that_weigh_nothing_teach_nothing(base: Path) -> None:
    rows, labels = replies(60)
    opposite = ["up" if label == "down" else "down" for label in labels]
    weights = [1.0] * 60 + [0.0] * 60
    said = fine_tune_preference(fresh(base), rows + rows, labels + opposite, THUMBS, OPTIONS, 3, weights=weights)
    happened = np.array([label == "up" for label in labels])
    found = probability(said.logits(rows))
    assert found[happened].min() > found[~happened].max()


def test_one_label_tells_nothing_apart(base: Path) -> None:
    rows, _ = replies(20)
    with pytest.raises(TrainingFailed, match=r"20 rows with 1 label\(s\)"):
        tune(base, rows, ["up"] * 20)


def test_a_training_that_was_stopped_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    rows, labels = pairs(40)
    whole = tune(base, rows, labels, tmp_path / "never.safetensors")
    file, save, saves = tmp_path / "stopped.safetensors", Loop._save, []

    def save_and_stop(loop: Loop, checkpoint: Checkpoint) -> None:
        save(loop, checkpoint)
        saves.append(loop.position.epoch)
        if len(saves) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Loop, "_save", save_and_stop)
        tune(base, rows, labels, file)
    assert file.exists()
    again = tune(base, rows, labels, file)
    assert np.array_equal(again.logits(rows), whole.logits(rows))


def test_a_ratio_is_that_of_two_whole_passes_though_the_lower_layers_are_computed_once(base: Path) -> None:
    rows, labels = pairs(40)
    tuned = tune(base, rows, labels)
    texts = reward.written(tuned.model, rows)
    own, bare = tuned.model.log_losses(texts)[0], Generator.load(base, 96, 32).log_losses(texts)[0]
    sizes = [len(text.tokens) - text.start for text in texts]
    ratios, layers = tuned.model.log_ratios(texts), layers_of(tuned.model.model)
    assert ratios == pytest.approx((bare - own) * sizes, abs=1e-4)
    assert np.abs(ratios).max() > 0.1
    passes = [0, 0]
    for n, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, n=n: passes.__setitem__(n, passes[n] + 1))
    tuned.model.log_ratios(texts)
    assert first_adapted(tuned.model.model) == 1
    assert passes == [passes[0], 2 * passes[0]]


def test_several_threads_may_ask_one_model(base: Path, tmp_path: Path) -> None:
    rows, labels = pairs(40)
    tuned = tune(base, rows, labels)
    write_adapter(tmp_path / "adapter", tuned.model, str(base))
    served = Generator.load(base, 96, 32, adapter=tmp_path / "adapter", apart=True)
    texts = reward.written(served, rows)
    alone, writes = served.log_ratios(texts), served.complete(["ask 1"])
    with ThreadPoolExecutor(4) as threads:
        ratios = [threads.submit(served.log_ratios, texts) for _ in range(6)]
        written = [threads.submit(served.complete, ["ask 1"]) for _ in range(6)]
    assert all(np.allclose(one.result(), alone, atol=1e-4) for one in ratios)
    assert all(one.result()[0].text == writes[0].text for one in written)
