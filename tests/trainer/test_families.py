"""Bases of other families than the two that come as packages: tiny ones with random weights.

An adapter goes into the top layer of each, the layers below are passed over, and a bundle's adapter is served as it was
learned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from accrual.encoder import Encoder, base_folder
from accrual.errors import TrainingFailed
from accrual.generator import Generator
from accrual.layers import first_adapted, starting_at, watching
from accrual.training_policy import Lora
from trainer.adapter import adapt
from trainer.freeze import write_adapter

SHAPE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
GROUPED = {**SHAPE, "num_key_value_heads": 4}
READ: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "deberta-v2": SHAPE,
    "distilbert": {"dim": 48, "n_layers": 3, "n_heads": 4, "hidden_dim": 96},
    "electra": {**SHAPE, "embedding_size": 48},
    "modernbert": {**SHAPE, "pad_token_id": 0},
    "mpnet": SHAPE,
    "roberta": {**SHAPE, "max_position_embeddings": 140},
}
WRITE: dict[str, dict[str, Any]] = {
    "gemma2": {**GROUPED, "head_dim": 12},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4},
    "gpt_neox": SHAPE,
    "llama": GROUPED,
    "mistral": GROUPED,
    "olmo2": GROUPED,
    "opt": {**SHAPE, "ffn_dim": 96, "word_embed_proj_dim": 48},
    "phi3": {**GROUPED, "pad_token_id": 0},
    "qwen3": {**GROUPED, "head_dim": 12},
}
TEXTS = ["hello there you", "a longer text than the other one", "x"]


def base(family: str, auto: Any, words: str, shape: dict[str, Any], folder: Path) -> Path:
    """A model of the family with random weights, and the tokenizer of another, in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder(words))
    torch.manual_seed(1)
    auto.from_config(AutoConfig.for_model(family, vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learn(model: Encoder | Generator) -> int:
    """An adapter that does something; the number of its layer."""
    first = adapt(model, Lora(rank=2, alpha=4, layers=1))
    assert first == first_adapted(model.model) == 2
    for weight in model.model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    return first


def whole_and_passed_over(model: Encoder | Generator, first: int, say: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What the model says, and what it says again where the layers below `first` are passed over."""
    with watching(model.model, first) as seen:
        whole = say()
    with starting_at(model.model, first) as begin:
        begin.states = seen.states.detach()
        return whole, say()


@pytest.mark.parametrize("family", READ)
def test_an_encoder_of_this_family_is_adapted_by_layer_and_served(family: str, tmp_path: Path) -> None:
    folder = base(family, AutoModel, "minilm", READ[family], tmp_path / "base")
    model = Encoder.load(folder, 64)
    tokens = model.tokenize(TEXTS)
    bare, first = model.pooled(tokens), learn(model)
    whole, again = whole_and_passed_over(model, first, lambda: model.pooled(tokens))
    assert (whole - bare).abs().max() > 0.01
    assert torch.allclose(again, whole, atol=1e-6)
    gradients = torch.autograd.grad(again.sum(), [p for p in model.model.parameters() if p.requires_grad])
    assert all(gradient.isfinite().all() for gradient in gradients)
    write_adapter(tmp_path / "adapter", model, str(folder))
    served = Encoder.load(folder, 64, adapter=tmp_path / "adapter")
    assert torch.allclose(served.pooled(tokens), whole, atol=1e-5)


@pytest.mark.parametrize("family", WRITE)
def test_a_generator_of_this_family_is_adapted_by_layer_and_served(family: str, tmp_path: Path) -> None:
    folder = base(family, AutoModelForCausalLM, "smollm2", WRITE[family], tmp_path / "base")
    model = Generator.load(folder, 64, 16)
    rows = model.written(["say it", "do"], ["well now", "yes it is good"])
    bare, first = model.log_likelihoods(rows), learn(model)
    whole, again = whole_and_passed_over(model, first, lambda: model.log_likelihoods(rows))
    assert (whole - bare).abs().max() > 0.01
    assert torch.allclose(again, whole, atol=1e-4)
    assert model.log_ratios(rows) == pytest.approx((whole - bare).tolist(), abs=1e-3)
    write_adapter(tmp_path / "adapter", model, str(folder))
    served = Generator.load(folder, 64, 16, adapter=tmp_path / "adapter")
    assert torch.allclose(served.log_likelihoods(rows), whole, atol=1e-3)


def test_a_base_whose_layers_are_one_and_the_same_is_refused_in_words(tmp_path: Path) -> None:
    folder = base("albert", AutoModel, "minilm", {**SHAPE, "embedding_size": 48}, tmp_path)
    with pytest.raises(TrainingFailed, match="no stack of 3 layers in AlbertModel"):
        adapt(Encoder.load(folder, 64), Lora(layers=1))
