"""`--at`: a snapshot of the lake, by its number or by a time."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import typer

from accrual.config import Config


class Moment(msgspec.Struct, frozen=True):
    """A snapshot, or what was the newest one at `time`."""

    snapshot: int | None = None
    time: datetime | None = None


def moment(text: str) -> Moment:
    """`42` is a snapshot; `2025-03-01`, `2025-03-01T12:00` and `2025-03-01T12:00+01:00` are times, UTC by default."""
    if text.isdecimal():
        return Moment(snapshot=int(text))
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise typer.BadParameter(
            f"'{text}' is neither a snapshot's number nor a time such as 2025-03-01T12:00"
        ) from exc
    return Moment(time=at if at.tzinfo else at.replace(tzinfo=UTC))


def snapshot_of(config: Config, at: Moment | None) -> int | None:
    """The snapshot meant, None for the newest. Raises like `open_lake`, and LakeError for a time before the lake's."""
    if at is None or at.time is None:
        return at.snapshot if at else None
    from accrual.lake import open_lake

    with open_lake(config) as lake:
        return lake.snapshot_at(at.time)
