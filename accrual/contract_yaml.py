"""A contract as text: YAML in which no mistake passes for a setting, and where and how one is mended."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

import msgspec
import yaml


def read_yaml(text: str) -> Any:
    """What the YAML says. Raises yaml.YAMLError, also for a key that is there twice and a number that is none."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """YAML without what is a mistake in a contract: a key twice, a number that is none. `1e-3` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = float(super().construct_yaml_float(node))
        if math.isnan(value):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} is no number", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def line_of(text: str, message: str) -> str:
    """`:LINE` of the deepest key that a message's `$.a.b` path names, or nothing."""
    match = re.search(r"\$\.([\w.-]+)", message)
    missing = re.search(r"unknown field `([^`]+)`", message)
    keys = (match[1].split(".") if match else []) + ([missing[1]] if missing else [])
    node = yaml.compose(text)
    line: int | None = None
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            break
        entry = next(((k, v) for k, v in node.value if k.value == key), None)
        if entry is None:
            break
        line, node = entry[0].start_mark.line + 1, entry[1]
    return f":{line}" if line else ""


def hint(message: str, kind: type) -> str:
    """The fix of what a `kind` was not read for, where msgspec's message has none."""
    field = re.search(r"\$\.?([\w.\[\]-]*)", message)
    found = _type_at(field[1] if field else "", kind)
    if unknown := re.search(r"unknown field `([^`]+)`", message):
        known = [one.encode_name for one in found.fields] if isinstance(found, msgspec.inspect.StructType) else []
        near = difflib.get_close_matches(unknown[1], known, n=1)
        what = f"write `{near[0]}`, or remove it" if near else "remove it or correct its spelling"
        return f"; {what} (docs/contract.md lists the fields)"
    if "missing required field" in message:
        return "; add it (docs/contract.md lists the fields)"
    if "Invalid enum value" in message and isinstance(found, msgspec.inspect.LiteralType):
        return f"; write one of {', '.join(map(str, found.values))}"
    return ""


def _type_at(path: str, kind: type) -> msgspec.inspect.Type | None:
    """What belongs where a message's `$.a.b` path leads."""
    found: msgspec.inspect.Type | None = msgspec.inspect.type_info(kind)
    for key in re.findall(r"[\w-]+|\[\.*\w*\]", path):
        if isinstance(found, msgspec.inspect.UnionType):
            found = next((one for one in found.types if isinstance(one, msgspec.inspect.StructType)), None)
        if isinstance(found, msgspec.inspect.StructType):
            found = next((one.type for one in found.fields if one.encode_name == key), None)
        elif isinstance(found, msgspec.inspect.DictType):
            found = found.value_type
        elif isinstance(found, msgspec.inspect.ListType):
            found = found.item_type
    if isinstance(found, msgspec.inspect.UnionType):
        kinds = msgspec.inspect.StructType, msgspec.inspect.LiteralType
        found = next((one for one in found.types if isinstance(one, kinds)), None)
    return found
