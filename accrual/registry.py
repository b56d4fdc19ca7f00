"""A Schema Registry (Confluent's HTTP interface, which Karapace and Apicurio speak too), asked about contracts.

A contract's inputs and outcome values are JSON Schemas under the subjects `<stream>.inputs` and `<stream>.values`. The
registry's own compatibility level decides what a new version may change.
"""

from __future__ import annotations

import base64
import urllib.error
import urllib.request
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import msgspec

from accrual.contract import Contract, Field
from accrual.errors import ConfigError, ContractError, RegistryUnavailable

_TIMEOUT_S = 10.0
_TYPE = "application/vnd.schemaregistry.v1+json"


class _Verdict(msgspec.Struct):
    is_compatible: bool
    messages: list[str] = []


def schemas_of(contract: Contract) -> dict[str, str]:
    """The JSON Schema of each subject of a contract."""
    return {
        f"{contract.stream}.inputs": _schema(contract.inputs),
        f"{contract.stream}.values": _schema(contract.outcome.values),
    }


def incompatibilities(url: str, contract: Contract) -> list[str]:
    """What the registry has against a contract; empty if nothing, or where it has no version of it yet.

    Raises RegistryUnavailable, ConfigError if it refuses the credentials.
    """
    found = []
    for subject, schema in schemas_of(contract).items():
        answer = _ask(url, f"/compatibility/subjects/{quote(subject)}/versions/latest?verbose=true", schema)
        if answer is not None:
            verdict = msgspec.json.decode(answer, type=_Verdict)
            if not verdict.is_compatible:
                found.append(f"{subject}: {'; '.join(verdict.messages) or 'not compatible with the latest version'}")
    return found


def register(url: str, contract: Contract) -> None:
    """Add the contract's schemas as the latest versions; the same schema again adds none.

    Raises ContractError if the registry refuses one, RegistryUnavailable, ConfigError.
    """
    for subject, schema in schemas_of(contract).items():
        _ask(url, f"/subjects/{quote(subject)}/versions", schema)


def _schema(fields: dict[str, Field]) -> str:
    kinds = {name: {"type": [field.type, "null"] if field.optional else field.type} for name, field in fields.items()}
    bounds = (("maxLength", "max_length"), ("minimum", "minimum"), ("maximum", "maximum"))
    for name, field in fields.items():
        kinds[name] |= {key: bound for key, own in bounds if (bound := getattr(field, own)) is not None}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": kinds,
        "required": [name for name, field in fields.items() if not field.optional],
    }
    return msgspec.json.encode(schema).decode()


def _ask(url: str, path: str, schema: str) -> bytes | None:
    """POST a schema; None where the registry has no such subject."""
    parts = urlsplit(url)
    headers = {"Content-Type": _TYPE, "Accept": _TYPE}
    if parts.username:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    body = msgspec.json.encode({"schemaType": "JSON", "schema": schema})
    request = urllib.request.Request(address + path, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as exc:
        said = exc.read().decode(errors="replace")[:500]
        if exc.code == 404:
            return None
        if exc.code in (401, 403):
            raise ConfigError(
                f"registry.url: {address} refuses its credentials: write https://user:password@host"
            ) from exc
        if exc.code in (409, 422):
            raise ContractError(f"the registry at {address} refuses {path}: {said}") from exc
        raise RegistryUnavailable(f"the registry at {address} answers {exc.code}: {said}") from exc
    except (OSError, ValueError) as exc:
        raise RegistryUnavailable(f"no Schema Registry answers at {address} (registry.url): {exc}") from exc
