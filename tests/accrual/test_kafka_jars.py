"""The jars of the development broker: fetched once, verified, never left half-done. No network: a fake plays jgo."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from accrual import kafka_jars
from accrual.errors import BrokerSetupError
from accrual.kafka_jars import Jar, ensure_jars, kafka_version, locked_jars

CONTENT = b"a jar"
JARS = [
    Jar("org.apache.kafka:kafka_2.13:9.9.9", hashlib.sha256(CONTENT).hexdigest()),
    Jar("org.example:other:1.0", hashlib.sha256(CONTENT).hexdigest()),
]


class FakeResolver:
    """Stands in for jgo's resolver: writes what `content` gives for a jar's file name."""

    def __init__(self, content: Callable[[str], bytes]) -> None:
        self.content = content
        self.fetched: list[str] = []

    def download(self, artifact: object) -> Path:
        path: Path = artifact.cached_path  # type: ignore[attr-defined]
        path.parent.mkdir(parents=True)
        path.write_bytes(self.content(path.name))
        self.fetched.append(path.name)
        return path


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> FakeResolver:
    fake = FakeResolver(lambda _: CONTENT)
    monkeypatch.setattr(kafka_jars, "locked_jars", lambda: JARS)
    monkeypatch.setattr("jgo.maven.PythonResolver", lambda: fake)
    return fake


def test_the_lock_names_each_jar_once_with_a_whole_digest() -> None:
    jars = locked_jars()
    assert len({jar.filename for jar in jars}) == len(jars)
    assert all(len(bytes.fromhex(jar.sha256)) == 32 for jar in jars)
    assert {"kafka-server", "kafka-tools", "slf4j-simple"} <= {jar.coordinates.split(":")[1] for jar in jars}
    assert kafka_version(jars) == "4.3.1"


def test_jars_are_fetched_once(tmp_path: Path, resolver: FakeResolver) -> None:
    folder = ensure_jars(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["kafka_2.13-9.9.9.jar", "other-1.0.jar"]
    assert ensure_jars(tmp_path) == folder
    assert sorted(resolver.fetched) == ["kafka_2.13-9.9.9.jar", "other-1.0.jar"]
    assert [p.name for p in tmp_path.iterdir()] == ["kafka-9.9.9"], "the scratch folder is left behind"


def test_an_altered_jar_is_refused_and_nothing_is_kept(tmp_path: Path, resolver: FakeResolver) -> None:
    resolver.content = lambda name: CONTENT if name.startswith("kafka") else b"another jar"
    with pytest.raises(BrokerSetupError, match=r"org\.example:other:1\.0 is not the locked jar"):
        ensure_jars(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_an_error_with_a_way_out(tmp_path: Path, resolver: FakeResolver) -> None:
    def fail(_: str) -> bytes:
        raise ConnectionError("no route to host")

    resolver.content = fail
    with pytest.raises(BrokerSetupError, match=r"no route to host.*kafka\.bootstrap_servers"):
        ensure_jars(tmp_path)


def test_a_folder_with_a_missing_jar_is_replaced(tmp_path: Path, resolver: FakeResolver) -> None:
    folder = ensure_jars(tmp_path)
    (folder / "other-1.0.jar").unlink()
    assert (ensure_jars(tmp_path) / "other-1.0.jar").read_bytes() == CONTENT
