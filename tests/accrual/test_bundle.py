"""Bundles: what was sealed verifies; whatever is altered, added or taken away does not, and is named."""

import os
import time
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accrual.bundle import (
    MANIFEST,
    ROWS,
    SIGNATURE,
    Manifest,
    drafted,
    ids_learned_from,
    read_manifest,
    rows_of_bundle,
    seal_bundle,
    verify_bundle,
)
from accrual.encoder import base_digest
from accrual.errors import BundleError, SigningKeyError
from accrual.signing import load_or_make_signing_key

FACTS = Manifest(
    stream="s",
    version=1,
    parent="s@0",
    parent_digest="0" * 64,
    run_id="s@1-a",
    windows=[1],
    snapshot_id=3,
    rows_new=10,
    rows_replayed=0,
    rows_digest="",
    seed=1,
    base="minilm",
    base_digest=None,
    made_with={},
)


@pytest.fixture
def key(tmp_path: Path) -> Ed25519PrivateKey:
    return load_or_make_signing_key(tmp_path / "keys" / "signing.key", tmp_path / "keys" / "signing.pub")


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "signing.pub"


@pytest.fixture
def bundle(tmp_path: Path, key: Ed25519PrivateKey) -> Path:
    store = tmp_path / "models"
    with drafted(store) as draft:
        (draft / "labels.json").write_text('["a", "b"]')
        (draft / "tokenizer").mkdir()
        (draft / "tokenizer" / "vocab.txt").write_text("a\nb\n")
        digest = seal_bundle(draft, FACTS, key)
    assert [path.name for path in store.iterdir()] == [digest], "no draft is left"
    return store / digest


def test_what_was_sealed_verifies(bundle: Path, public: Path) -> None:
    manifest = verify_bundle(bundle, public)
    assert manifest.model == "s@1"
    assert set(manifest.files) == {"labels.json", "tokenizer/vocab.txt"}


def test_the_same_content_has_the_same_digest(bundle: Path, key: Ed25519PrivateKey) -> None:
    with drafted(bundle.parent) as draft:
        (draft / "tokenizer").mkdir()
        (draft / "tokenizer" / "vocab.txt").write_text("a\nb\n")
        (draft / "labels.json").write_text('["a", "b"]')
        assert seal_bundle(draft, FACTS, key) == bundle.name


def test_a_base_that_was_exchanged_in_its_place_is_another(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    first = base_digest(tmp_path)
    weights.write_bytes(b"two")
    assert base_digest(tmp_path) != first
    weights.write_bytes(b"one")
    assert base_digest(tmp_path) == first


def test_what_a_killed_process_left_is_cleared_after_a_day(bundle: Path) -> None:
    store = bundle.parent
    for name, age in ((".draft-old", 90_000), (".draft-young", 10)):
        (store / name).mkdir()
        (store / name / "weights").write_text("half")
        os.utime(store / name, (time.time() - age,) * 2)
    with drafted(store):
        assert {folder.name for folder in store.iterdir()} > {bundle.name, ".draft-young"}
        assert not (store / ".draft-old").exists()


def test_an_altered_file_is_named(bundle: Path, public: Path) -> None:
    (bundle / "labels.json").write_text('["b", "a"]')
    with pytest.raises(BundleError, match=r"labels\.json was altered"):
        verify_bundle(bundle, public)


def test_a_missing_file_is_named(bundle: Path, public: Path) -> None:
    (bundle / "tokenizer" / "vocab.txt").unlink()
    with pytest.raises(BundleError, match=r"vocab\.txt is missing"):
        verify_bundle(bundle, public)


def test_an_added_file_is_named(bundle: Path, public: Path) -> None:
    (bundle / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(BundleError, match=r"pytorch_model\.bin is not in the manifest"):
        verify_bundle(bundle, public)


def test_an_altered_manifest_is_not_signed(bundle: Path, public: Path) -> None:
    altered = msgspec.structs.replace(read_manifest(bundle), version=9)
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(altered))
    with pytest.raises(BundleError, match="was not signed"):
        verify_bundle(bundle, public)


def test_another_trainers_signature_does_not_count(bundle: Path, public: Path) -> None:
    content = (bundle / MANIFEST).read_bytes()
    (bundle / SIGNATURE).write_bytes(Ed25519PrivateKey.generate().sign(content))
    with pytest.raises(BundleError, match="was not signed"):
        verify_bundle(bundle, public)


def test_a_bundle_under_another_name_is_refused(bundle: Path, public: Path) -> None:
    other = bundle.rename(bundle.parent / ("f" * 64))
    with pytest.raises(BundleError, match="not named by the digest"):
        verify_bundle(other, public)


def test_the_key_is_made_once_and_is_private(tmp_path: Path, key: Ed25519PrivateKey, public: Path) -> None:
    again = load_or_make_signing_key(tmp_path / "keys" / "signing.key", public)
    assert again.private_bytes_raw() == key.private_bytes_raw()
    assert (tmp_path / "keys" / "signing.key").stat().st_mode & 0o077 == 0
    public.write_text("not a key")
    with pytest.raises(SigningKeyError, match="not the public half"):
        load_or_make_signing_key(tmp_path / "keys" / "signing.key", public)


def _made_from(store: Path, key: Ed25519PrivateKey, ids: list[str], parent: str | None, warm: bool) -> str:
    facts = msgspec.structs.replace(FACTS, parent_digest=parent, start="champion" if warm else "base")
    with drafted(store) as draft:
        pq.write_table(pa.table({"prediction_id": ids, "weight": [1.0] * len(ids)}), draft / ROWS)
        return seal_bundle(draft, facts, key)


def test_a_models_rows_are_its_own_and_those_of_whose_weights_it_began_with(
    bundle: Path, key: Ed25519PrivateKey
) -> None:
    store = bundle.parent
    with drafted(store) as draft:
        zero = seal_bundle(draft, msgspec.structs.replace(FACTS, version=0), key)
    assert ids_learned_from(store, zero) == set(), "generation 0 has none"
    first = _made_from(store, key, ["a", "b"], zero, warm=False)
    second = _made_from(store, key, ["b", "c"], first, warm=False)
    third = _made_from(store, key, ["d"], second, warm=True)
    fourth = _made_from(store, key, ["e"], third, warm=True)
    assert rows_of_bundle(store / fourth) == {"e"}
    assert ids_learned_from(store, second) == {"b", "c"}, "begun anew: what its parent knew is not in it"
    assert ids_learned_from(store, fourth) == {"b", "c", "d", "e"}


def test_rows_that_cannot_be_read_are_no_empty_set(bundle: Path) -> None:
    (bundle / ROWS).write_bytes(b"not parquet")
    with pytest.raises(BundleError, match=r"rows\.parquet cannot be read"):
        ids_learned_from(bundle.parent, bundle.name)


@pytest.mark.parametrize(
    ("levers", "scale", "retention", "said"),
    [
        ([], 1.0, None, ""),
        ([], 1.0, -0.0012, "-0.0012 on the probe against the base"),
        ([], 0.5, -0.01, "-0.0100 on the probe against the base, by the adapter at 0.5"),
        (["distillation"], 0.7, 0.002, "+0.0020 on the probe against the base, by distillation and the adapter at 0.7"),
    ],
)
def test_a_manifest_says_what_was_kept_of_the_base_and_by_what(
    levers: list[str], scale: float, retention: float | None, said: str
) -> None:
    manifest = msgspec.structs.replace(FACTS, levers=levers, adapter_scale=scale, retention=retention)
    assert manifest.kept == said
