"""Audit records: what an audit found, in a file that is signed, so that it can be shown to somebody later.

    <state>/audits/2026-01-31T12:00:00Z-snapshot-4711.json      what was audited, by which contracts, and all findings
    <state>/audits/2026-01-31T12:00:00Z-snapshot-4711.json.sig  Ed25519 signature of that file's bytes

The key is the auditor's own, made at the first audit in <state>/keys/; whoever verifies needs its public half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version as installed_version
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature

from accrual.config import Config
from accrual.contract import Contract
from accrual.errors import AuditRecordError
from accrual.signing import load_or_make_signing_key, load_public_key
from consumers.audit import Audit
from consumers.recompute import Scope

VERSION = 1


class AuditRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One audit. `contracts` maps each stream to the SHA-256 of the contract that the join was recomputed by."""

    v: int = VERSION
    at: datetime
    made_with: str
    prefix: str
    scope: Scope
    contracts: dict[str, str]
    balanced: bool
    audit: Audit


_decode = msgspec.json.Decoder(AuditRecord).decode


def write_record(config: Config, contracts: Mapping[str, Contract], scope: Scope, found: Audit) -> Path:
    """Write and sign the record of an audit; returns its file. Raises AuditRecordError, SigningKeyError."""
    now = datetime.now(UTC).replace(microsecond=0)
    record = AuditRecord(
        at=now,
        made_with=installed_version("accrual"),
        prefix=config.topics.prefix,
        scope=scope,
        contracts={name: hashlib.sha256(msgspec.json.encode(c)).hexdigest() for name, c in contracts.items()},
        balanced=found.balanced,
        audit=found,
    )
    content = msgspec.json.format(msgspec.json.encode(record), indent=1)
    key = load_or_make_signing_key(*_keys(config))
    path = config.state_dir / "audits" / f"{now:%Y-%m-%dT%H:%M:%SZ}-snapshot-{found.snapshot_id}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        _signature(path).write_bytes(key.sign(content))
    except OSError as exc:
        raise AuditRecordError(
            f"{path}: the record cannot be written: {exc.strerror}; --no-record audits all the same"
        ) from exc
    return path


def verify_record(path: Path, public_key: Path) -> AuditRecord:
    """Read a record whose signature verifies. Raises AuditRecordError, SigningKeyError."""
    try:
        content, signature = path.read_bytes(), _signature(path).read_bytes()
    except OSError as exc:
        raise AuditRecordError(f"{exc.filename}: cannot be read: {exc.strerror}") from exc
    try:
        load_public_key(public_key).verify(signature, content)
    except InvalidSignature as exc:
        raise AuditRecordError(
            f"{path} was not signed with the key in {public_key}: either it was altered, or that is not the auditor's"
        ) from exc
    try:
        return _decode(content)
    except msgspec.DecodeError as exc:
        raise AuditRecordError(f"{path} is not an audit record that this version reads: {exc}") from exc


def public_key_of(config: Config) -> Path:
    """Where the public half of the auditor's key is, unless another file is given."""
    return _keys(config)[1]


def _keys(config: Config) -> tuple[Path, Path]:
    return config.state_dir / "keys" / "audit.key", config.state_dir / "keys" / "audit.pub"


def _signature(path: Path) -> Path:
    return path.with_name(f"{path.name}.sig")
