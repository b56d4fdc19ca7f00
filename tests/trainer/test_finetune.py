"""Fine-tuning on the real base model: what each option changes, and what must change nothing."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pytest
import torch

from accrual import layers
from accrual.encoder import Encoder, base_folder
from accrual.errors import ConfigError, StoreUnavailable, TrainingFailed
from accrual.training_policy import EarlyStopping, Lora, Training
from trainer import adapter, learner, loop
from trainer.checkpoint import digest_of
from trainer.finetune import Start, Tuned, fine_tune
from trainer.precision import choose

BANKING = Path(__file__).parents[2] / "examples" / "data" / "banking77" / "train.csv"
CLASSES = ["card_arrival", "exchange_rate", "lost_or_stolen_card"]
FEW = Training(template="{text}", epochs=2, max_tokens=32, lora=Lora(rank=2, alpha=4, layers=1))


def rows(count: int, classes: Sequence[str] = CLASSES, since: int = 0) -> tuple[list[str], list[str]]:
    """Texts and labels, the classes in turn."""
    with BANKING.open(encoding="utf-8", newline="") as file:
        every = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    by_class = [[row for row in every if row[1] == name] for name in classes]
    mixed = [row for several in zip(*by_class, strict=False) for row in several][since : since + count]
    return [text for text, _ in mixed], [label for _, label in mixed]


def tune(training: Training = FEW, count: int = 60, seed: int = 17, **options: Any) -> Tuned:
    texts, labels = rows(count)
    return fine_tune(Encoder.load(base_folder("minilm"), 32), texts, labels, CLASSES, training, seed, **options)


def digest(tuned: Tuned) -> str:
    trained = {name: tensor for name, tensor in tuned.model.model.state_dict().items() if "lora" in name}
    head = {"weight": torch.from_numpy(tuned.weight), "bias": torch.from_numpy(tuned.bias)}
    return digest_of(trained | head)


def changed(**fields: Any) -> Training:
    return msgspec.structs.replace(FEW, **fields)


def first_gradient(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradient of the first step, before it is clipped."""
    seen: list[list[torch.Tensor]] = []
    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", lambda held, _: seen.append([p.grad.clone() for p in held]))
        tune(changed(epochs=1))
    return seen[0]


@pytest.fixture(scope="module")
def plain() -> Tuned:
    return tune()


def logits(tuned: Tuned) -> np.ndarray:
    return tuned.logits(rows(12, since=60)[0])


def test_same_rows_and_seed_give_the_same_weights(plain: Tuned) -> None:
    assert digest(tune()) == digest(plain) != digest(tune(seed=18))


def test_it_tells_later_rows_apart(plain: Tuned) -> None:
    texts, labels = rows(60, since=60)
    right = [CLASSES[row.argmax()] == label for row, label in zip(plain.logits(texts), labels, strict=True)]
    assert np.mean(right) > 0.9


def test_weights_of_any_scale_count_rows(plain: Tuned) -> None:
    np.testing.assert_allclose(logits(tune(weights=[3.0] * 60)), logits(plain), atol=1e-5)
    half = [1.0 if label != CLASSES[0] else 0.0 for label in rows(60)[1]]
    assert logits(tune(weights=half)).argmax(axis=1).tolist().count(0) == 0, "a class of no weight is never said"


@pytest.mark.parametrize("wrong", [[1.0] * 59, [-1.0] + [1.0] * 59, [float("nan")] * 60, [0.0] * 60])
def test_weights_that_are_none_are_refused(wrong: list[float]) -> None:
    with pytest.raises(TrainingFailed, match="60 rows need as many weights"):
        tune(weights=wrong)


def test_accumulated_batches_are_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches a step are the step of one batch of both: the gradient is the same sum."""
    steps: list[list[list[int]]] = []
    original = loop.Loop._step

    def counted(self: loop.Loop, groups: list[list[int]], done: float) -> None:
        steps.append(groups)
        original(self, groups, done)

    monkeypatch.setattr(loop.Loop, "_step", counted)
    monkeypatch.setattr(loop, "batches", lambda _lengths: [list(range(30)), list(range(30, 60))])
    two = tune(changed(accumulate=2))
    assert [len(groups) for groups in steps] == [2, 2]
    joined = [[[row for group in groups for row in group]] for groups in steps]
    monkeypatch.setattr(loop.Loop, "_steps_of", lambda _self, epoch: [joined[epoch]])
    np.testing.assert_allclose(logits(tune()), logits(two), atol=1e-4)


def test_states_computed_again_give_the_same_model(plain: Tuned) -> None:
    np.testing.assert_allclose(logits(tune(changed(gradient_checkpointing=True))), logits(plain), atol=1e-5)


def test_a_batch_that_does_not_fit_is_done_in_pieces_with_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The allocator refuses more than 5 rows at once, with torch's own words."""
    expected = first_gradient(monkeypatch)
    largest: list[int] = []
    pooled = Encoder.pooled

    def crowded(self: Encoder, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        if len(tokens) > 5:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        largest.append(len(tokens))
        return pooled(self, tokens)

    monkeypatch.setattr(Encoder, "pooled", crowded)
    torch.testing.assert_close(first_gradient(monkeypatch), expected, rtol=1e-3, atol=1e-5)
    assert max(largest) > 1
    assert "out of memory" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_one_row_that_does_not_fit_ends_the_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Encoder, "pooled", crowded)
    with pytest.raises(TrainingFailed, match=r"one row of \d+ tokens"):
        tune()


def test_other_errors_of_torch_are_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Encoder, "pooled", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        tune()


def test_a_loss_that_is_no_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "weighted_loss", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(TrainingFailed, match="the loss is nan in epoch 1, step 1"):
        tune()


def test_a_loss_that_grows_ends_the_run() -> None:
    with pytest.raises(TrainingFailed, match="the loss has grown"):
        tune(changed(learning_rate=0.9, epochs=40))


def test_early_stopping_keeps_the_best_epoch_and_learns_nothing_from_the_latest_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learned: set[int] = set()
    said = iter([0.5, 0.4, 0.6, 0.7, 0.1])
    weights: list[str] = []

    def watched(self: loop.Loop) -> float:
        weights.append(digest_of(dict(enumerate_names(self._trained))))
        return next(said)

    original = loop.Loop._step

    def step(self: loop.Loop, groups: list[list[int]], done: float) -> None:
        learned.update(row for group in groups for row in group)
        original(self, groups, done)

    monkeypatch.setattr(loop.Loop, "_watched_loss", watched)
    monkeypatch.setattr(loop.Loop, "_step", step)
    trained: list[loop.Loop] = []
    run = loop.Loop.run
    monkeypatch.setattr(loop.Loop, "run", lambda self, at: (trained.append(self), run(self, at)))
    tune(changed(epochs=9, early_stopping=EarlyStopping(share=0.2, patience=2)))
    assert len(weights) == 4, "two epochs without a better one end it"
    assert digest_of(dict(enumerate_names(trained[0]._trained))) == weights[1]
    assert learned == set(range(48))


def enumerate_names(tensors: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(str(i), tensor) for i, tensor in enumerate(tensors)]


def test_what_lora_options_say_reaches_the_adapter() -> None:
    lora = Lora(rank=4, alpha=4, layers=2, targets=["query", "value"], modules_to_save=["attention.output.LayerNorm"])
    tuned = tune(changed(lora=msgspec.structs.replace(lora, rslora=True, dora=True), epochs=1))
    settings = tuned.model.model.peft_config["default"]
    assert (settings.use_rslora, settings.use_dora) == (True, True)
    names = [name for name, p in tuned.model.model.named_parameters() if p.requires_grad]
    layers = {name.split(".layer.")[1].split(".")[0] for name in names}
    assert layers == {"4", "5"}
    kinds = {name.split(".layer.")[1].split(".", 1)[1] for name in names}
    assert {kind.split(".")[2] for kind in kinds if "lora" in kind} == {"query", "value"}
    assert "attention.output.LayerNorm.modules_to_save.default.weight" in kinds


@pytest.mark.parametrize("option", ["targets", "modules_to_save"])
def test_a_name_that_is_nothing_in_the_top_layers_is_refused(option: str) -> None:
    with pytest.raises(TrainingFailed, match=f"training.lora.{option}: 'quarry'"):
        tune(changed(lora=Lora(**{option: ["quarry"]})))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_base_in_fewer_bits_needs_cuda() -> None:
    with pytest.raises(ConfigError, match=r"training\.quantize: 4bit"):
        Encoder.load(base_folder("minilm"), 32, quantize="4bit")


def test_states_that_memory_has_no_room_for_lie_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, rooms, room = digest(tune()), [], adapter._room

    def spied(spans: Sequence[tuple[int, int]]) -> BinaryIO:
        rooms.append(spans)
        return room(spans)

    monkeypatch.setattr(adapter, "_room", spied)
    monkeypatch.setattr(adapter, "CACHE_BYTES", 1000)
    assert digest(tune()) == expected
    assert len(rooms) == 1


@pytest.mark.parametrize("bytes_in_memory", [1, 1 << 29])
@pytest.mark.parametrize("mine", [[0, 1, 2], [1]])
def test_states_come_back_as_they_were_kept(
    mine: list[int], bytes_in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever format they were computed; behind a row's end its last one is repeated. Others' rows may be kept."""
    monkeypatch.setattr(adapter, "CACHE_BYTES", bytes_in_memory)
    states = adapter.States([2, 3, 1], 4, torch.device("cpu"), mine)
    given = torch.arange(36.0).view(3, 3, 4)
    states.keep([0, 1, 2], given.bfloat16())
    expected = given[mine].clone()
    for row, length in zip(expected, [[2, 3, 1][row] for row in mine], strict=True):
        row[length:] = row[length - 1]
    assert torch.equal(states.of(mine), expected[:, : max([2, 3, 1][row] for row in mine)])


def test_a_disk_without_room_for_the_states_is_said_before_they_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], check=False).returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("trainer.adapter.CACHE_BYTES", 1000)
    try:
        with pytest.raises(StoreUnavailable, match=r"No space left on device. Name another folder by TMPDIR"):
            tune()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_texts_have_the_same_few_bytes_of_tokens_however_many_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, (texts, _) = Encoder.load(base_folder("minilm"), 32), rows(20)
    tokens = encoder.tokenize(texts)
    assert {of_text.itemsize for of_text in tokens} == {4} and len({len(of_text) for of_text in tokens}) > 3
    monkeypatch.setattr("accrual.encoder._TEXTS_AT_ONCE", 3)
    assert encoder.tokenize(texts) == tokens
    assert encoder.tokenize([]) == []


def test_a_contract_that_says_bf16_has_the_frozen_layers_in_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    pooled = Encoder.pooled

    def watched(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return pooled(encoder, tokens)

    monkeypatch.setattr(Encoder, "pooled", watched)
    for precision in ("fp32", "bf16"):
        tuned = tune(changed(precision=precision, epochs=1))
        assert tuned.precision == precision
        assert len(seen) > 2 and set(seen) == {precision == "bf16"}
        seen.clear()


def test_an_encoder_whose_tokenizer_has_no_padding_pads_under_the_mask() -> None:
    """As those of GPT-2, Llama and Mistral are published."""
    encoder, texts = Encoder.load(base_folder("minilm"), 32), ["short", "a text that is much longer than the other"]
    expected = encoder.embed(texts)
    encoder.tokenizer.pad_token = None
    assert encoder.embed(texts) == pytest.approx(expected, abs=1e-6)


def champion(folder: Path, training: Training = FEW) -> tuple[Start, Tuned]:
    """A model whose adapter lies in a folder, as in a bundle."""
    tuned = tune(training)
    tuned.model.model.save_pretrained(folder / "adapter")
    return Start(folder / "adapter", tuned.weight, tuned.bias), tuned


def test_a_warm_start_takes_in_a_new_class_and_keeps_one_that_has_no_rows_now(tmp_path: Path) -> None:
    start, _ = champion(tmp_path)
    old, new = rows(60), rows(60, ["top_up_failed", "exchange_rate"])
    replayed = [(text, label) for text, label in zip(*old, strict=True) if label != "lost_or_stolen_card"][:30]
    texts = [*(text for text, _ in replayed), *new[0]]
    labels = [*(label for _, label in replayed), *new[1]]
    later, truth = rows(80, [*CLASSES, "top_up_failed"], since=120)
    right: dict[str, dict[str, float]] = {}
    for said_from in (start, None):
        base = Encoder.load(base_folder("minilm"), 32)
        tuned = fine_tune(base, texts, labels, CLASSES, FEW, 3, start=said_from)
        assert tuned.classes == [*CLASSES, "top_up_failed"]
        said = [tuned.classes[row.argmax()] for row in tuned.logits(later)]
        right[tuned.start] = {
            name: float(np.mean([a == b for a, b in zip(said, truth, strict=True) if b == name]))
            for name in tuned.classes
        }
    assert min(right["champion"].values()) > 0.9, right
    assert right["base"]["lost_or_stolen_card"] < 0.1, right


def test_a_champion_of_another_shape_is_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start, _ = champion(tmp_path, changed(lora=Lora(rank=4, alpha=4, layers=1)))
    tuned = tune(start=start)
    assert tuned.start == "base"
    assert "another shape" in caplog.text
    assert digest(tuned) == digest(tune())


def test_a_champion_of_another_scale_does_the_same(tmp_path: Path) -> None:
    start, before = champion(tmp_path)
    encoder = Encoder.load(base_folder("minilm"), 32)
    adapter.adapt(encoder, msgspec.structs.replace(FEW.lora, alpha=16, rslora=True))
    assert adapter.take_over(encoder, start.adapter)
    texts, _ = rows(12, since=60)
    np.testing.assert_allclose(encoder.embed(texts), before.model.embed(texts), atol=1e-5)


def test_a_broken_adapter_of_the_champion_ends_the_run(tmp_path: Path) -> None:
    start, _ = champion(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingFailed, match="cannot be read"):
        tune(start=start)


def test_precision_is_bf16_only_where_it_is_faster_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, now = torch.device("cpu"), [0.0]
    monkeypatch.setattr("trainer.precision.time.perf_counter", lambda: now[0])

    def batch(seconds: float, rounded: float) -> float:
        fast = torch.is_autocast_enabled("cpu")
        now[0] += seconds if fast else 1.0
        return rounded if fast else 1.0

    monkeypatch.setattr("trainer.precision._is_fast", lambda _device: True)
    assert choose("auto", cpu, lambda: batch(0.5, 1.001)) == "bf16"
    assert choose("auto", cpu, lambda: batch(0.9, 1.001)) == "fp32", "not enough"
    assert choose("auto", cpu, lambda: batch(0.5, 1.1)) == "fp32", "another loss"
    monkeypatch.setattr("trainer.precision._is_fast", lambda _device: False)
    assert choose("auto", cpu, lambda: batch(0.5, 1.0)) == "fp32", "emulated"
    assert choose("bf16", cpu, lambda: batch(9.0, 9.0)) == "bf16", "the contract says so"


def test_the_model_is_whole_again_after_the_loop(plain: Tuned) -> None:
    """Skipped and recomputed layers are put back: the vectors are those of a base merged with the adapter."""
    assert not any(isinstance(layer, layers._Pass) for layer in layers.layers_of(plain.model.model))
    assert not any("forward" in vars(layer) for layer in layers.layers_of(plain.model.model))
