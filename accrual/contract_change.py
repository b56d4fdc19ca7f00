"""What a new version of a contract may change while the stream goes on. Pure.

May change: a field is added (optional), widened (`integer` to `number`, wider bounds, optional) or renamed (`was`); a
class is added; everything that only operates the stream or trains on it. Nothing in the lake is rewritten for it.
May not: what would refuse events that were fine, read rows of before differently than they were meant, or show what was
hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

from accrual.contract import Contract, Field

_LABELING = ("label", "join", "horizon_us", "on_expiry", "late")


def breaking_changes(old: Contract, new: Contract) -> list[str]:
    """Each change from `old` to `new` that may not be, with the reason; empty if there is none."""
    if old.stream != new.stream:
        return [f"stream: '{old.stream}' is now '{new.stream}': that is another stream, with a contract of its own"]
    found = _fields("inputs", old.inputs, new.inputs)
    found += _fields("outcome.values", old.outcome.values, new.outcome.values)
    if gone := [name for name in old.output.classes if name not in new.output.classes]:
        found.append(f"output.classes: {', '.join(gone)} removed: rows of before have this label")
    if old.output.open and not new.output.open:
        found.append("output.open: labels outside the classes were allowed, and are in rows of before")
    if old.output.task != new.output.task:
        found.append("output.task: changed: outputs and labels of before are of another kind; begin a new stream")
    for name in _LABELING:
        if getattr(old, name) != getattr(new, name):
            found.append(
                f"{name.removesuffix('_us')}: changed: labels of before would not be those the audit recomputes;"
                " begin a new stream"
            )
    for name in sorted(old.label_fields & new.label_fields):
        before, now = old.field_types[name], new.field_types[name]
        if (before, now) == ("integer", "number"):
            found.append(f"outcome.values.{name}: integer is now number, and the label comes from it: 3 would be 3.0")
    return found


def _fields(where: str, old: Mapping[str, Field], new: Mapping[str, Field]) -> list[str]:
    now = {name: (own, field) for own, field in new.items() for name in (own, *field.names_before)}
    found: list[str] = []
    for name, before in old.items():
        if name not in now:
            found.append(f"{where}.{name}: removed: rows of before have it; keep it with `optional: true`")
            continue
        own, field = now.pop(name)
        renamed = "" if own == name else f" (now {own})"
        found += [f"{where}.{name}{renamed}: {problem}" for problem in _narrowings(before, field)]
        forgotten = [n for n in before.names_before if n not in field.names_before]
        found += [f"{where}.{name}{renamed}: rows of before have the name {n}: keep it in `was`" for n in forgotten]
    there = {now_name for name in old for now_name, field in new.items() if name in (now_name, *field.names_before)}
    return found + [
        f"{where}.{name}: new and required: events of services that do not know it would be refused;"
        " add it with `optional: true`"
        for name, field in new.items()
        if name not in there and not field.optional
    ]


def _narrowings(old: Field, new: Field) -> list[str]:
    found: list[str] = []
    if old.pii != new.pii and old.pii and new.pii != "redact":
        now = "pseudonymised" if new.pii else "sent as it is"
        found.append(f"pii was {old.pii}: what was hidden would be {now} from now on; begin a new field for that")
    if old.type != new.type and (old.type, new.type) != ("integer", "number"):
        found.append(f"type {old.type} is now {new.type}: only integer may become number")
    if old.optional and not new.optional:
        found.append("was optional: rows and events of before lack it")
    if new.max_length is not None and (old.max_length is None or new.max_length < old.max_length):
        found.append(f"max_length is now {new.max_length}: longer values were fine")
    if new.minimum is not None and (old.minimum is None or new.minimum > old.minimum):
        found.append(f"minimum is now {new.minimum:g}: smaller values were fine")
    if new.maximum is not None and (old.maximum is None or new.maximum < old.maximum):
        found.append(f"maximum is now {new.maximum:g}: greater values were fine")
    return found
