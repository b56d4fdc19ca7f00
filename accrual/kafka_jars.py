"""Apache Kafka's jars for the development broker: fetched once, verified, shared by every checkout of this user."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import resources
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import track

from accrual.errors import BrokerSetupError

# What the set-up announces before it fetches; the jars of Kafka 4.3 measure 56 MB.
DOWNLOAD_MB = 60


class Jar(msgspec.Struct, frozen=True):
    """One line of `kafka.lock`: Maven coordinates `group:artifact:version` and the SHA-256 of the jar, in hex."""

    coordinates: str
    sha256: str

    @property
    def filename(self) -> str:
        """Name of the jar in the cache; unique, because no two locked jars share artifact and version."""
        _, artifact, version = self.coordinates.split(":")
        return f"{artifact}-{version}.jar"


def locked_jars() -> list[Jar]:
    """The jars this release runs on, from the lock beside this file."""
    text = resources.files("accrual").joinpath("kafka.lock").read_text(encoding="utf-8")
    return [Jar(*line.split()) for line in text.splitlines() if line and not line.startswith("#")]


def kafka_version(jars: list[Jar]) -> str:
    """The version of Apache Kafka in the lock, such as `4.3.1`."""
    return next(jar.coordinates.rpartition(":")[2] for jar in jars if ":kafka_2.13:" in jar.coordinates)


def ensure_jars(cache: Path, console: Console | None = None) -> Path:
    """The folder of jars under `cache`, filled first if it is not there yet.

    A fetch goes to a folder of its own and is renamed when every jar is there and verified, so an interrupted one
    leaves no half-filled folder, and two at the same time do no harm. `console` shows what is fetched and
    how far it is. Raises BrokerSetupError when a jar cannot be fetched or is not the locked one.
    """
    jars = locked_jars()
    folder = cache / f"kafka-{kafka_version(jars)}"
    if _is_complete(folder, jars):
        return folder
    console = console or Console(stderr=True)
    console.print(
        f"Fetching Apache Kafka {kafka_version(jars)} for the development broker:"
        f" {len(jars)} jars, about {DOWNLOAD_MB} MB, once per user, into {folder}"
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        complete = Path(scratch) / "jars"
        complete.mkdir()
        _fetch(jars, Path(scratch) / "repository", complete, console)
        _put_in_place(complete, folder, jars)
    return folder


def _fetch(jars: list[Jar], repository: Path, into: Path, console: Console) -> None:
    """Fetch every jar through the Maven cache `repository` and move the verified ones to `into`."""
    try:
        import truststore

        # Trust what the machine trusts, as pip does, and not only the authorities that `requests` brings.
        truststore.inject_into_ssl()
        from jgo.maven import MavenContext, PythonResolver
        from jgo.parse import Coordinate
    except ModuleNotFoundError as exc:
        raise BrokerSetupError(
            f"the development broker needs `{exc.name}` to fetch Apache Kafka: pip install 'accrual[broker]'"
        ) from exc
    maven = MavenContext(resolver=PythonResolver(), repo_cache=repository, timeout=60)

    def fetch(jar: Jar) -> None:
        try:
            path: Path = maven.create_dependency(Coordinate.parse(jar.coordinates)).artifact.resolve()
        except (OSError, RuntimeError) as exc:  # what jgo and the HTTP client under it raise
            raise BrokerSetupError(
                f"cannot fetch {jar.coordinates} from the Maven repository: {exc}; check the network (proxy,"
                " certificates) and try again, or set kafka.bootstrap_servers to another broker"
            ) from exc
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != jar.sha256:
            raise BrokerSetupError(f"{jar.coordinates} is not the locked jar: SHA-256 {found}, expected {jar.sha256}")
        path.rename(into / jar.filename)

    # A jar is mostly waiting: eight at a time take a third of the time of one after the other.
    with ThreadPoolExecutor(max_workers=8) as pool:
        fetches = [pool.submit(fetch, jar) for jar in jars]
        try:
            for done in track(as_completed(fetches), "Apache Kafka", total=len(jars), console=console):
                done.result()
        except BaseException:  # the first failure, or Ctrl-C: fetch no more
            pool.shutdown(cancel_futures=True)
            raise


def _put_in_place(complete: Path, folder: Path, jars: list[Jar]) -> None:
    """Rename `complete` to `folder`, unless another process was faster."""
    try:
        complete.rename(folder)
    except OSError as exc:
        if _is_complete(folder, jars):
            return
        try:  # what is there is broken: jars were deleted, or the disk was full
            shutil.rmtree(folder)
            complete.rename(folder)
        except OSError:
            raise BrokerSetupError(f"cannot write Apache Kafka's jars to {folder}: {exc}") from exc


def _is_complete(folder: Path, jars: list[Jar]) -> bool:
    return all((folder / jar.filename).is_file() for jar in jars)
