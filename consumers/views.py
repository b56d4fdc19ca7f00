"""The audit and the windows as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from accrual.commands.rows import printable
from consumers.audit import Audit, Balance, OutcomeBalance
from consumers.canary_stream import Fate
from consumers.explain import Life
from consumers.recall import TouchedWindow
from consumers.refill import Refilled
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


def show_windows(
    sealed: Sequence[dict[str, Any]], next_ones: Sequence[tuple[Candidate, float | None]], console: Console
) -> None:
    """Print the sealed windows, and what the next one of each stream waits for, with its maturity so far."""
    columns = ["stream", "window", "until", "rows", "labeled", "coverage", "maturity", "touched", "snapshot", "digest"]
    table = _table("sealed windows", columns)
    for w in sealed:
        table.add_row(
            w["stream"],
            str(w["window"]),
            f"{w['to_time']:%Y-%m-%d %H:%M}",
            f"{w['rows']:,}",
            f"{w['labeled']:,}",
            f"{w['coverage']:.1%}",
            f"{w['maturity']:.1%}",
            f"{w['touched']:,}",
            str(w["snapshot_id"]),
            w["digest"][:12],
        )
    console.print(table)
    for candidate, maturity in next_ones:
        known = "not known yet" if maturity is None else f"{maturity:.1%}"
        console.print(
            Text(f"{candidate.stream}: window {candidate.window} waits for {candidate.waits_for}; maturity {known}")
        )


def show_recall(found: Sequence[TouchedWindow], console: Console) -> None:
    """Print the touched windows and the generations that learned from them."""
    if not found:
        console.print(Text("No sealed window was touched: every generation learned from what still holds."))
        return
    columns = ["stream", "window", "predictions", "labels_changed", "erased", "first_at", "last_at", "generations"]
    table = _table("touched windows", columns)
    for w in found:
        times = (f"{at:%Y-%m-%d %H:%M}" for at in (w.first_at, w.last_at))
        counts = (f"{w.predictions:,}", f"{w.labels_changed:,}", f"{w.erased:,}")
        table.add_row(w.stream, str(w.window), *counts, *times, ", ".join(w.generations) or "none")
    console.print(table)


def show_canaries(stream: str, found: Sequence[Fate], missed: Sequence[str], console: Console) -> None:
    """Print what became of a stream's canaries."""
    if not found:
        console.print(
            Text(f"The lake has no canaries of {stream}: `accrual canaries STREAM --into {stream}` sends some.")
        )
        return
    table = _table(f"canaries of {stream}", ["rule", "sent", "refused", "quarantined", "waiting", "recall"])
    for fate in found:
        recall = "-" if fate.recall is None else f"{fate.recall:.3f}"
        counts = (fate.sent, fate.refused, fate.quarantined, fate.sent - fate.decided)
        table.add_row(fate.rule, *(f"{count:,}" for count in counts), recall)
    console.print(table)
    if missed:
        console.print(Text(f"These let too many through: {', '.join(missed)}", style="red"))


def show_life(life: Life, console: Console) -> None:
    """Print one prediction's life."""
    table = _table(f"prediction {life.prediction_id}", ["at", "what", "record", "event_time", "detail"])
    for h in life.happenings:
        event_time = f"{h.event_time:%Y-%m-%d %H:%M:%S}" if h.event_time else ""
        record = f"{h.topic}[{h.partition}]@{h.offset}"
        table.add_row(f"{h.at:%Y-%m-%d %H:%M:%S}", h.what, record, event_time, Text(printable(h.detail)))
    console.print(table)
    for w in life.windows:
        touched = ", touched since" if w.touched else ""
        models = ", ".join(w.models) or "no generation yet"
        console.print(
            Text(
                f"sealed in window {w.window} of {w.stream} at {w.sealed_at:%Y-%m-%d %H:%M}"
                f" (snapshot {w.snapshot_id}, digest {w.digest[:12]}{touched}); trained on it: {models}"
            )
        )
    if not life.windows:
        console.print(Text("in no sealed window yet: no model has learned from it"))


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
    words = {"stream", "day", "id", "kind", "detail", "digest", "at", "what", "record", "generations"}
    for name in columns:
        table.add_column(name.replace("_", "-"), justify="left" if name in words else "right", overflow="fold")
    return table


def show_refilled(done: Sequence[Refilled], console: Console) -> None:
    """Print what became of damaged files."""
    table = Table("table", "file", Column("rows", justify="right"), "")
    for one in done:
        said = f"[red]{one.why}[/]: {', '.join(one.lost)}" if one.lost else one.why or "[green]written again[/]"
        table.add_row(one.table, one.path, f"{one.rows:,}", said)
    if done:
        console.print(table)
    console.print(f"{len(done)} damaged files, {sum(not one.why for one in done)} written again")
