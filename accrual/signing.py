"""Signing keys: Ed25519, each half in a PEM file. The trainer signs models with one, the audit its records."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from accrual.errors import SigningKeyError


def load_or_make_signing_key(private: Path, public: Path) -> Ed25519PrivateKey:
    """The key at `private`; made if there is none, with its public half at `public`.

    Raises SigningKeyError when a private key is there but cannot be used.
    """
    if not private.exists():
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write_whole(private, pem, mode=0o600)
    try:
        loaded = serialization.load_pem_private_key(private.read_bytes(), password=None)
    except (OSError, ValueError) as exc:
        raise SigningKeyError(f"{private}: the signing key cannot be read: {exc}") from exc
    if not isinstance(loaded, Ed25519PrivateKey):
        raise SigningKeyError(f"{private}: not an Ed25519 key; remove it and a new one is made")
    pem = loaded.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if not public.exists():
        _write_whole(public, pem, mode=0o644)
    elif public.read_bytes() != pem:
        raise SigningKeyError(f"{public}: not the public half of {private}; nobody could verify what is signed with it")
    return loaded


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The key that verifies. Raises SigningKeyError."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as exc:
        raise SigningKeyError(
            f"{path}: no public key there ({exc.strerror}); whoever signs writes it at the first start:"
            " copy it from there (models.public_key names the trainer's)"
        ) from exc
    except ValueError as exc:
        raise SigningKeyError(f"{path}: not a public key in PEM form: {exc}") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise SigningKeyError(f"{path}: not an Ed25519 public key")
    return key


def _write_whole(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that a reader sees it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
