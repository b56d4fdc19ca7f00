"""The audit and the windows as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from consumers.audit import Audit, Balance, OutcomeBalance
from consumers.windows import Candidate

_SHOWN_DIFFERENCES = 20


def show_audit(found: Audit, by_day: bool, console: Console) -> None:
    """Print the books, what differs, and the verdict."""
    columns = ["captured", "labeled", "expired", "pending", "dead_lettered", "duplicate", "erased", "unaccounted"]
    table = _table("predictions", ["stream", *(["day"] if by_day else []), *columns])
    for key, group in _grouped(found.balances, by_day):
        table.add_row(*key, *(f"{sum(getattr(b, name) for b in group):,}" for name in columns))
    ends = ["in_labels", "incomplete", "duplicate", "late", "orphaned", "waiting", "dead_lettered", "erased"]
    outcomes = ["captured", *ends, "unaccounted"]
    second = _table("outcomes", ["stream", *outcomes])
    for o in found.outcomes:
        second.add_row(_named(o), *(f"{getattr(o, name):,}" for name in outcomes))
    read = sum(c.next_offset - c.first_offset for c in found.coverage)
    covered = Text(f"{read:,} records read from {len(found.coverage)} topic-partitions of raw events, ", style="dim")
    covered.append(f"snapshot {found.snapshot_id}, {found.seconds:.1f} s")
    console.print(Group(table, second, covered, *_differences(found)))


def show_windows(sealed: Sequence[dict[str, Any]], next_ones: Sequence[Candidate], console: Console) -> None:
    """Print the sealed windows, and what the next one of each stream waits for."""
    table = _table("sealed windows", ["stream", "window", "until", "rows", "labeled", "coverage", "snapshot", "digest"])
    for w in sealed:
        table.add_row(
            w["stream"],
            str(w["window"]),
            f"{w['to_time']:%Y-%m-%d %H:%M}",
            f"{w['rows']:,}",
            f"{w['labeled']:,}",
            f"{w['coverage']:.1%}",
            str(w["snapshot_id"]),
            w["digest"][:12],
        )
    console.print(table)
    for candidate in next_ones:
        console.print(Text(f"{candidate.stream}: window {candidate.window} waits for {candidate.waits_for}"))


def _differences(found: Audit) -> list[RenderableType]:
    if found.balanced:
        return [Text("The books balance: the join, recomputed from the raw events, is the same.", style="green")]
    kinds = Counter(d.kind for d in found.differences)
    summary = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
    table = _table(f"differences: {summary}", ["stream", "id", "kind", "detail"])
    for d in found.differences[:_SHOWN_DIFFERENCES]:
        table.add_row(Text(d.stream or ""), Text(d.id), d.kind, Text(d.detail))
    more = len(found.differences) - _SHOWN_DIFFERENCES
    if more > 0:
        table.caption = f"and {more:,} more: --json FILE has all"
    return [table, Text("The books do not balance.", style="bold red")]


def _grouped(balances: Iterable[Balance], by_day: bool) -> Iterable[tuple[tuple[str, ...], list[Balance]]]:
    groups: dict[tuple[str, ...], list[Balance]] = {}
    for b in balances:
        groups.setdefault((_named(b), str(b.day)) if by_day else (_named(b),), []).append(b)
    return groups.items()


def _named(b: Balance | OutcomeBalance) -> str:
    return b.stream or "(unreadable)"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    words = {"stream", "day", "id", "kind", "detail", "digest"}
    for name in columns:
        table.add_column(name.replace("_", "-"), justify="left" if name in words else "right", overflow="fold")
    return table
