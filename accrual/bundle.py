"""A model bundle: one folder that is a whole model, under one digest, signed.

    <model store>/<digest>/
        manifest.json         what made it, and the SHA-256 of every other file; `digest` is this file's own
        manifest.sig          Ed25519 signature of manifest.json's bytes
        contract.yaml         the contract it was made from
        labels.json           its classes, in the order of the head's rows
        head.safetensors      `bias` [classes] and, unless it is a constant model, `weight` [classes, dimensions]
        calibrator.json       how its logits become probabilities
        tokenizer/ adapter/   unless it is a constant model; `adapter` (PEFT, fp32) once it was trained
        rows.parquet          what it learned from: prediction_id, revision, label, part, weight; not of generation 0
        README.md             the model card

The base model is not in it: it never changes, and is known by its own digest. Nothing in a bundle is executable;
weights are safetensors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accrual.errors import BundleError, StoreUnavailable
from accrual.signing import load_public_key

VERSION = 1
MANIFEST = "manifest.json"
_ABANDONED_S = 86_400.0
SIGNATURE = "manifest.sig"
ROWS = "rows.parquet"
_PROBE_BYTES = 1 << 20


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What made a model. It holds no clock time: the same rows, seed and code give the same digest.

    `parent` and `parent_digest` name the champion it was trained to replace (None for generation 0). `windows` are all
    whose rows it has seen, read at lake snapshot `snapshot_id`; `rows_digest` is over what rows.parquet says of each.
    `selection` counts what was chosen and what was not (docs/training-data.md).
    `start`: whether training went on from the base or from the parent's adapter and head. `base_digest` is None for a
    constant model, which needs no base. So that the base's abilities are kept, it was trained with `levers` beside the
    contract's options (trainer/retention.py), and the adapter's part then multiplied with `adapter_scale`; `retention`
    is how far above the base it is on the contract's probe, whose file has `probe_digest`. `files` maps relative names
    to SHA-256.
    """

    v: int = VERSION
    stream: str
    version: int
    parent: str | None
    parent_digest: str | None
    run_id: str
    windows: list[int]
    snapshot_id: int | None
    rows_new: int
    rows_replayed: int
    rows_digest: str
    seed: int
    base: str
    base_digest: str | None
    start: Literal["base", "champion"] = "base"
    made_with: dict[str, str]
    levers: list[str] = []
    adapter_scale: float = 1.0
    retention: float | None = None
    probe_digest: str | None = None
    selection: dict[str, int] = {}
    files: dict[str, str] = {}

    @property
    def model(self) -> str:
        """`stream@version`, as predictions name it."""
        return f"{self.stream}@{self.version}"

    @property
    def kept(self) -> str:
        """For people: what the probe said of the model, and what that took; empty where no probe was asked."""
        if self.retention is None:
            return ""
        by = [*self.levers, *([f"the adapter at {self.adapter_scale:g}"] if self.adapter_scale != 1 else [])]
        return f"{self.retention:+.4f} on the probe against the base" + (f", by {' and '.join(by)}" if by else "")


_decode = msgspec.json.Decoder(Manifest).decode


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def drafted(store: Path) -> Iterator[Path]:
    """An empty folder in the store in which a bundle can be put together; gone at the end unless it was sealed.

    Raises StoreUnavailable, in place of whatever was raised inside, when the store cannot be written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        for left in store.glob(".draft-*"):  # by processes that were killed
            with suppress(FileNotFoundError):  # another one cleans up, too
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=".draft-", dir=store))
    except OSError as exc:
        raise StoreUnavailable(f"the model store {store} cannot be written: {exc.strerror}") from exc
    try:
        yield folder
    except Exception as exc:
        if reason := _refused(folder):  # libraries that write in Rust or C++ say so in errors of their own
            raise StoreUnavailable(f"the model store {store} cannot be written: {reason}") from exc
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def seal_bundle(draft: Path, manifest: Manifest, key: Ed25519PrivateKey) -> str:
    """Write manifest and signature into the draft and move it to its final name, all or nothing; returns the digest.

    A store that has that digest already has that bundle: then the draft is left for its owner to drop.
    """
    files = {path.relative_to(draft).as_posix(): sha256_of(path) for path in _files(draft)}
    content = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)), indent=2)
    (draft / MANIFEST).write_bytes(content)
    (draft / SIGNATURE).write_bytes(key.sign(content))
    for path in _files(draft):
        _sync(path)
    draft.chmod(0o755)  # mkdtemp's is for its owner only, and services may run as others
    digest = hashlib.sha256(content).hexdigest()
    target = draft.parent / digest
    if not target.is_dir():
        draft.rename(target)
        _sync(target.parent)
    return digest


def read_classes(folder: Path) -> list[str]:
    """The classes of a bundle's model, in the order of the head's rows. Raises BundleError."""
    try:
        return msgspec.json.decode((folder / "labels.json").read_bytes(), type=list[str])
    except (OSError, msgspec.DecodeError) as exc:
        raise BundleError(f"{folder}: not a whole bundle: {exc}") from exc


def read_manifest(folder: Path) -> Manifest:
    """The manifest, not verified. Raises BundleError when it is missing or cannot be read."""
    return _parsed(_content(folder), folder)


def rows_of_bundle(folder: Path) -> set[str]:
    """The ids of the predictions that a model was made from: trained on, replayed or calibrated with.

    Empty for generation 0. Raises BundleError when the file cannot be read.
    """
    if not (folder / ROWS).exists():
        return set()
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        return set(read_table(folder / ROWS, columns=["prediction_id"])["prediction_id"].to_pylist())
    except (OSError, ArrowException) as exc:
        raise BundleError(f"{folder}: {ROWS} cannot be read: {exc}") from exc


def ids_learned_from(store: Path, digest: str) -> set[str]:
    """The ids of all predictions that have had a part in a model's weights: its own rows and, as long as weights were
    begun from a parent's, the parent's. Raises BundleError when a bundle of the line is missing or cannot be read.
    """
    found: set[str] = set()
    for folder in weights_from(store, digest):
        if read_manifest(folder).version and not (folder / ROWS).exists():
            raise BundleError(f"{folder}: {ROWS} is missing: nobody can say which rows the model learned from")
        found |= rows_of_bundle(folder)
    return found


def weights_from(store: Path, digest: str) -> Iterator[Path]:
    """The folders of a model's bundle and, as long as weights were begun from a parent's, of the parent's. Raises
    BundleError when one is missing or cannot be read.
    """
    line: str | None = digest
    while line is not None:
        yield store / line
        manifest = read_manifest(store / line)
        line = manifest.parent_digest if manifest.start == "champion" else None


def verify_bundle(folder: Path, public_key: Path) -> Manifest:
    """Check a bundle whole: signature, the digest it is named by, every file's digest, and that nothing was added.

    Raises BundleError naming the file that is wrong, SigningKeyError when `public_key` cannot be used.
    """
    content = _content(folder)
    try:
        load_public_key(public_key).verify((folder / SIGNATURE).read_bytes(), content)
    except OSError as exc:
        raise BundleError(f"{folder}: {SIGNATURE} cannot be read: {exc.strerror}") from exc
    except InvalidSignature as exc:
        raise BundleError(
            f"{folder}: {MANIFEST} was not signed with the key in {public_key}; either it was altered, or"
            " models.public_key is not the trainer's"
        ) from exc
    if hashlib.sha256(content).hexdigest() != folder.name:
        raise BundleError(f"{folder}: the folder is not named by the digest of its {MANIFEST}: it is another bundle's")
    manifest = _parsed(content, folder)
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST, SIGNATURE}
    for name in sorted(present - set(manifest.files)):
        raise BundleError(f"{folder}: {name} is not in the manifest")
    for name, digest in manifest.files.items():
        if name not in present or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"{folder}: {name} is missing")
        if sha256_of(folder / name) != digest:
            raise BundleError(f"{folder}: {name} was altered: its SHA-256 is not the manifest's")
    return manifest


def _content(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError as exc:
        raise BundleError(f"{folder}: {MANIFEST} cannot be read: {exc.strerror}") from exc


def _parsed(content: bytes, folder: Path) -> Manifest:
    try:
        manifest = _decode(content)
    except msgspec.DecodeError as exc:
        raise BundleError(f"{folder}: {MANIFEST} is not a manifest this version reads: {exc}") from exc
    if manifest.v != VERSION:
        raise BundleError(f"{folder}: {MANIFEST} has v {manifest.v}; this version reads v {VERSION}")
    return manifest


def _files(folder: Path) -> list[Path]:
    """Everything below a folder that is not a folder, links too."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _refused(folder: Path) -> str | None:
    """Why no file can be written there now; None if one can. The draft it is tried in is dropped."""
    try:
        (folder / ".probe").write_bytes(bytes(_PROBE_BYTES))
    except OSError as exc:
        return exc.strerror
    return None


def _sync(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
