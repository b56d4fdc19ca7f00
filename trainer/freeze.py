"""Freeze: what was trained becomes a bundle in the model store, and never changes again.

A challenger is frozen before it is judged. Generation 0 is made here too: all it knows is the contract.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from safetensors.numpy import save_file

from accrual.bundle import MANIFEST, ROWS, Manifest, drafted, read_manifest, seal_bundle, sha256_of
from accrual.calibrator import Calibrator
from accrual.contract import Contract
from accrual.encoder import Encoder, base_digest, base_folder
from accrual.errors import BundleError
from accrual.generator import Generator
from accrual.output import Output
from trainer.finetune import Tuned
from trainer.finetune_preference import TunedPreference
from trainer.finetune_text import TunedText
from trainer.model_card import model_card
from trainer.ranks import Ranks

# The cosine between a text and a label's name, times this, is generation 0's logit. There are no labels to fit it on;
# on the launch window of support-intents 15 gives Brier 0.507, 20 gives 0.517, 10 gives 0.547.
NAME_SCALE = 15.0
# What the numbers come from. Of accrual and trainer it is the code itself that counts.
_LIBRARIES = ("numpy", "peft", "pyarrow", "safetensors", "scikit-learn", "scipy", "tokenizers", "torch", "transformers")
_PACKAGES = ("accrual", "trainer")
_NO_BIAS = np.zeros(0, dtype=np.float32)  # of a model without a head


def freeze(
    store: Path,
    key: Ed25519PrivateKey,
    contract: Contract,
    manifest: Manifest,
    tuned: Tuned | TunedText | TunedPreference,
    calibrator: Calibrator,
    rows: pa.Table,
) -> str:
    """Write a trained model as a bundle; returns its digest. `manifest` comes without digests of files and base.

    `rows` are those it learned from (trainer.select.ROW_COLUMNS).
    """
    with drafted(store) as draft:
        write_rows(draft / ROWS, rows)
        write_adapter(draft / "adapter", tuned.model, manifest.base)
        tuned.model.tokenizer.save_pretrained(draft / "tokenizer")
        manifest = msgspec.structs.replace(manifest, base_digest=base_digest(base_folder(manifest.base)))
        if isinstance(tuned, TunedText):
            return _finish(draft, key, contract, manifest, [], None, _NO_BIAS, calibrator)
        return _finish(draft, key, contract, manifest, tuned.classes, tuned.weight, tuned.bias, calibrator)


def freeze_generation_0(store: Path, key: Ed25519PrivateKey, contract: Contract, base: str) -> str:
    """Write the model that knows the contract only; returns its digest.

    With `output.prior` it says that of every row. Without, a row belongs to the class whose name is most like it; where
    names say nothing of it, as in a ranking, classes share evenly, a score is 1/2. Texts are what the base writes.
    """
    manifest = Manifest(
        stream=contract.stream,
        version=0,
        parent=None,
        parent_digest=None,
        run_id=generation_0_id(contract, base),
        windows=[],
        snapshot_id=None,
        rows_new=0,
        rows_replayed=0,
        rows_digest="",
        seed=contract.training.seed,
        base=base,
        base_digest=None,
        made_with=made_with(),
    )
    classes, prior = contract.output.classes, contract.output.prior
    with drafted(store) as draft:
        if contract.output.writes:
            folder = base_folder(base)
            Generator.load(
                folder, contract.training.max_tokens, contract.output.max_new_tokens
            ).tokenizer.save_pretrained(draft / "tokenizer")
            manifest = msgspec.structs.replace(manifest, base_digest=base_digest(folder))
            bias = _constant(contract.output) if classes else _NO_BIAS
            return _finish(draft, key, contract, manifest, classes, None, bias, Calibrator(method="none"))
        if prior is not None or contract.output.task != "classification":
            bias = _constant(contract.output)
            calibrator = Calibrator(each=contract.output.each)
            return _finish(draft, key, contract, manifest, classes, None, bias, calibrator)
        folder = base_folder(base)
        manifest = msgspec.structs.replace(manifest, base_digest=base_digest(folder))
        encoder = Encoder.load(folder, contract.training.max_tokens)
        encoder.tokenizer.save_pretrained(draft / "tokenizer")
        names = encoder.embed([name.replace("_", " ").replace("-", " ") for name in classes])
        zeros = np.zeros(len(classes), dtype=np.float32)
        return _finish(draft, key, contract, manifest, classes, names * np.float32(NAME_SCALE), zeros, Calibrator())


def _constant(output: Output) -> NDArray[np.float32]:
    """The logits [classes] of a model that says the same of every row."""
    even = 0.5 if output.task == "score" else 1 / len(output.classes)
    said = np.array([(output.prior or {}).get(name, even) for name in output.classes])
    logits = np.log(said) - np.log1p(-said) if output.each else np.log(said)
    return np.asarray(logits, dtype=np.float32)


def generation_0_id(contract: Contract, base: str) -> str:
    """The same for the same contract and base, which decide all of it."""
    said = msgspec.json.encode([msgspec.to_builtins(contract), base])
    return f"{contract.stream}@0-{hashlib.sha256(said).hexdigest()[:12]}"


def find_frozen(store: Path, run_id: str, rows_digest: str) -> str | None:
    """The digest of the bundle that a run left in the store, if it came that far before it was interrupted.

    One of other rows, of which some were erased since, is not taken. A draft whose process was killed is none: it was
    not sealed.
    """
    for path in store.glob(f"[!.]*/{MANIFEST}"):
        try:
            manifest = read_manifest(path.parent)
            if (manifest.run_id, manifest.rows_digest) == (run_id, rows_digest):
                return path.parent.name
        except BundleError:
            continue  # whatever it is, it is not this run's
    return None


def made_with() -> dict[str, str]:
    """What a bundle's bytes depend on besides its inputs: versions of code, and what shares a sum."""
    versions = {name: installed_version(name) for name in ("accrual", *_LIBRARIES)}
    machine = {
        "threads": str(torch.get_num_threads()),
        "processes": str(Ranks().world),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return {**versions, "code": _code(), **machine}


@cache
def _code() -> str:
    """A digest of the code that makes bundles, and of the texts it ships with: a version number says less."""
    root = Path(__file__).parents[1]
    files = [path for package in _PACKAGES for path in (root / package).rglob("*.py")]
    files = sorted([*files, *(Path(__file__).parent / "probes").iterdir()])
    lines = [f"{sha256_of(path)}  {path.relative_to(root).as_posix()}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def _finish(
    draft: Path,
    key: Ed25519PrivateKey,
    contract: Contract,
    manifest: Manifest,
    classes: Sequence[str],
    weight: NDArray[np.float32] | None,
    bias: NDArray[np.float32],
    calibrator: Calibrator,
) -> str:
    head = {"bias": bias}
    if weight is not None:
        head["weight"] = np.ascontiguousarray(weight)
    save_file(head, draft / "head.safetensors")
    (draft / "labels.json").write_bytes(msgspec.json.encode(list(classes)))
    (draft / "calibrator.json").write_bytes(msgspec.json.encode(calibrator))
    as_yaml = yaml.safe_dump(msgspec.to_builtins(contract), sort_keys=False, allow_unicode=True)
    (draft / "contract.yaml").write_text(as_yaml, encoding="utf-8")
    (draft / "README.md").write_text(model_card(contract, manifest, classes, calibrator), encoding="utf-8")
    return seal_bundle(draft, manifest, key)


def write_rows(file: Path, rows: pa.Table) -> None:
    """The same bytes for the same rows, by the same version of pyarrow. A million ids take some 20 MB."""
    pq.write_table(
        rows, file, version="2.6", compression="zstd", compression_level=9, row_group_size=1 << 20, store_schema=False
    )


def write_adapter(folder: Path, model: Encoder | Generator, base: str) -> None:
    """PEFT's two files, the same bytes for the same weights, and without the path of the base on this machine."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file as save_tensors

    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model.model).items()}
    save_tensors(tensors, folder / "adapter_model.safetensors")
    settings: dict[str, Any] = model.model.peft_config["default"].to_dict()
    settings |= {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(settings["target_modules"]),
    }
    encoded = msgspec.json.encode(settings, enc_hook=_plain, order="deterministic")
    (folder / "adapter_config.json").write_bytes(msgspec.json.format(encoded, indent=2))


def _plain(value: Any) -> Any:
    """What PEFT's settings hold besides JSON's own types: enumerations (their value)."""
    return getattr(value, "value", None) or str(value)
