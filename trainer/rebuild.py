"""Rebuild: a generation is made again from what its manifest names. The same digest, or what has changed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accrual.bundle import ROWS, Manifest, read_manifest, verify_bundle
from accrual.config import Config
from accrual.contract import Contract, load_contract
from accrual.encoder import base_digest, base_folder
from accrual.errors import ConfigError, ContractError, LakeError
from accrual.lake import open_lake
from accrual.predictor import Predictor
from trainer.challenger import Champion, make_challenger
from trainer.freeze import freeze_generation_0, made_with
from trainer.retention import read_probe
from trainer.select import LAKE_MEMORY, Selection, sealed_windows, select

_NAMED = 3  # ids, of rows that differ


class Rebuilt(msgspec.Struct, frozen=True):
    """`digest` of the bundle that was made again, None if it was not tried; `changed` says why it is not the same."""

    digest: str | None
    changed: list[str]


def rebuild(config: Config, bundle: str) -> Rebuilt:
    """Make the model of a bundle again, in a temporary folder, unless an input of it is no longer what it was.

    Raises BundleError for a bundle, of the model or of its champion, that does not verify, TrainingFailed.
    """
    folder = config.model_store / bundle
    manifest = verify_bundle(folder, config.public_key)
    contract = load_contract(folder / "contract.yaml")
    torch.set_num_threads(int(manifest.made_with.get("threads", torch.get_num_threads())))
    changed = [*_versions(manifest), *_base(manifest), *_probe(contract, manifest)]
    selection: Selection | None = None
    if manifest.version and manifest.snapshot_id is not None:
        try:
            selection = _selection(config, contract, manifest)
        except LakeError as exc:
            changed.append(f"lake: {exc}")
        else:
            changed += _rows(folder / ROWS, selection.rows)
    if changed:
        return Rebuilt(None, changed)
    with tempfile.TemporaryDirectory(prefix="rebuild-") as store:
        digest = _made(config, Path(store), contract, manifest, selection)
    return Rebuilt(digest, [] if digest == bundle else ["none of the inputs: another processor computes otherwise"])


def _made(config: Config, store: Path, contract: Contract, manifest: Manifest, selection: Selection | None) -> str:
    key = Ed25519PrivateKey.generate()  # a digest is over the manifest, and not over its signature
    if selection is None:
        return freeze_generation_0(store, key, contract, manifest.base)
    parent = config.model_store / (manifest.parent_digest or "")
    blank = msgspec.structs.replace(
        manifest,
        files={},
        base_digest=None,
        start="base",
        levers=[],
        adapter_scale=1.0,
        retention=None,
        probe_digest=None,
        made_with=made_with(),
    )
    retention = contract.gate.retention
    probe = read_probe(retention.probe, contract.output.task) if retention is not None else None
    champion = Champion(Predictor.load(parent, config), parent)
    return make_challenger(store, key, contract, blank, champion, selection, probe, None)


def _selection(config: Config, contract: Contract, manifest: Manifest) -> Selection:
    """The rows that would be chosen today, at the snapshot of then."""
    parent = read_manifest(config.model_store / (manifest.parent_digest or ""))
    new = set(manifest.windows) - set(parent.windows) or {max(manifest.windows)}
    with open_lake(config) as lake:
        windows = [window for window in sealed_windows(lake, contract.stream) if window.window in new]
    if {window.window for window in windows} != new:
        raise LakeError(f"it no longer has the sealed windows {sorted(new)}")
    with open_lake(config, at_snapshot=manifest.snapshot_id, memory=LAKE_MEMORY) as lake:
        return select(lake, contract, windows, manifest.seed)


def _versions(manifest: Manifest) -> Iterable[str]:
    now = made_with()
    for name, then in manifest.made_with.items():
        if name != "precision" and now.get(name) != then:
            yield f"{name}: {then} then, {now.get(name, 'none')} now"


def _base(manifest: Manifest) -> Iterable[str]:
    if manifest.base_digest is None:
        return
    try:
        now = base_digest(base_folder(manifest.base))
    except ConfigError as exc:
        yield f"base: {exc}"
    else:
        if now != manifest.base_digest:
            yield f"base: the files of '{manifest.base}' are others than then"


def _probe(contract: Contract, manifest: Manifest) -> Iterable[str]:
    if contract.gate.retention is None or manifest.probe_digest is None:
        return
    try:
        now = read_probe(contract.gate.retention.probe, contract.output.task).digest
    except ContractError as exc:
        yield str(exc)
    else:
        if now != manifest.probe_digest:
            yield f"gate.retention.probe: the file '{contract.gate.retention.probe}' is another than then"


def _rows(listed: Path, now: pa.Table) -> Iterable[str]:
    """What of the rows differs from the bundle's own list."""
    then = pq.read_table(listed)
    if then.equals(now):
        return
    columns = ["prediction_id", "revision", "label", "part", "weight"]
    before, after = (
        {row[0]: row[1:] for row in zip(*(table[name].to_pylist() for name in columns), strict=True)}
        for table in (then, now)
    )
    for what, ids in (
        ("are gone (erased, or quarantined since)", before.keys() - after.keys()),
        ("have come", after.keys() - before.keys()),
        ("say something else", {one for one in before.keys() & after.keys() if before[one] != after[one]}),
    ):
        if ids:
            yield f"rows: {len(ids)} {what}, such as {', '.join(sorted(ids)[:_NAMED])}"
