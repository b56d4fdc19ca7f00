"""Personal data, hidden in the service before an event leaves it: redacted, or replaced by a pseudonym.

A pseudonym is a keyed hash (BLAKE2b, RFC 7693): the same text has the same one, so that rows can still be counted and
joined by it, and without the key nobody can try out texts to find the one it stands for. It begins with a mark of its
key: after the key was changed, pseudonyms of before and after tell themselves apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from accrual.contract import REDACTED, Contract, Field
from accrual.errors import ConfigError

_LEAST_KEY = 16  # characters

Hide = Callable[[Any], Any]


class Hider:
    """What a stream's contract says of personal data, compiled once: a call costs about a microsecond a field."""

    def __init__(self, contract: Contract | None, key: str) -> None:
        """Raises ConfigError if the contract wants pseudonyms and there is no key for them."""
        self._inputs: list[tuple[str, Hide]] = []
        self._values: list[tuple[str, Hide]] = []
        self._entity: Hide | None = None
        if contract is None:
            return
        self._inputs = _hidden(contract, "inputs", contract.inputs, key)
        self._values = _hidden(contract, "outcome.values", contract.outcome.values, key)
        if contract.join is not None and contract.join.pseudonymise:
            self._entity = _pseudonyms(contract, "join", key)

    def inputs(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs as they may be sent."""
        return _without(inputs, self._inputs) if self._inputs else inputs

    def values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """An outcome's values as they may be sent."""
        return _without(values, self._values) if self._values else values

    def entity(self, entity: str) -> str:
        """The business key as it may be sent."""
        return entity if self._entity is None else str(self._entity(entity))


def pseudonym_of(key: str) -> Callable[[Any], str]:
    """What replaces a text, by this key. Raises ConfigError if the key is missing or too short to be secret."""
    if len(key) < _LEAST_KEY:
        problem = f"has {len(key)} characters, and at least {_LEAST_KEY} are needed" if key else "is not set"
        raise ConfigError(
            f"pii.key (ACCRUAL_PII_KEY) {problem}: pseudonyms are made with it, the same in every service;"
            " make one with `openssl rand -hex 32`"
        )
    secret = hashlib.sha256(key.encode()).digest()
    mark = hashlib.blake2b(key=secret, digest_size=4, person=b"accrual key mark").hexdigest()
    keyed = hashlib.blake2b(key=secret, digest_size=16)

    def pseudonym(value: Any) -> str:
        digest = keyed.copy()
        digest.update(str(value).encode("utf-8", "surrogatepass"))
        return f"{mark}-{digest.hexdigest()}"

    return pseudonym


def _hidden(contract: Contract, where: str, fields: Mapping[str, Field], key: str) -> list[tuple[str, Hide]]:
    """Each name that a personal field may come by, and what becomes of its value."""
    found: list[tuple[str, Hide]] = []
    for own, field in fields.items():
        if field.pii is None:
            continue
        hide = _redacted(field) if field.pii == "redact" else _pseudonyms(contract, f"{where}.{own}", key)
        found += [(name, hide) for name in (own, *field.names_before)]
    return found


def _redacted(field: Field) -> Hide:
    instead = None if field.optional else REDACTED
    return lambda _: instead


def _pseudonyms(contract: Contract, where: str, key: str) -> Hide:
    try:
        return pseudonym_of(key)
    except ConfigError as exc:
        raise ConfigError(f"{exc} ({where} of stream '{contract.stream}' is pseudonymised)") from None


def _without(given: Mapping[str, Any], hidden: list[tuple[str, Hide]]) -> dict[str, Any]:
    sent = dict(given)
    for name, hide in hidden:
        if sent.get(name) is not None:
            sent[name] = hide(sent[name])
    return sent
