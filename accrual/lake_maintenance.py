"""Keeping the lake small: small files are merged, snapshots of long ago forgotten, files nobody needs deleted.

Readers are not disturbed: a file is deleted a day after it was last needed, and the snapshots that sealed windows and
runs name are kept for ever. Every call does a limited piece of work; what is left waits for the next one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from accrual.lake import Lake, WritableLake

KEEP_SNAPSHOTS = timedelta(days=7)
KEEP_FILES = timedelta(days=1)
_SMALL_BYTES = 16 << 20
# Merging begins when so many files of a table are small, beyond one for each partition: every row is rewritten rarely.
_SURPLUS = 32
_PARTITIONS_AT_ONCE = 16
_SNAPSHOTS_AT_ONCE = 1_000
_MOVES = 5_000

_TABLES = "select table_name, file_count, file_size_bytes from ducklake_table_info('lake') order by table_name"
_EXPIRABLE = f"""
select snapshot_id from ducklake_snapshots('lake')
where snapshot_time < ? and snapshot_id > 0 and snapshot_id < (select max(snapshot_id) from ducklake_snapshots('lake'))
    and snapshot_id not in (select snapshot_id from windows union all select snapshot_id from runs)
order by snapshot_id limit {_SNAPSHOTS_AT_ONCE}
"""


class TableSize(msgspec.Struct, frozen=True):
    """The files of a table; `surplus` of them could be merged away."""

    table: str
    files: int
    bytes: int
    surplus: int


class Work(msgspec.Struct, frozen=True):
    """What maintenance did, or would do: tables whose files are merged, snapshots expired, files deleted.

    `files` belonged to expired snapshots or were merged; `orphans` to no commit at all, such as a killed sink's.
    """

    merged: list[str]
    snapshots: int
    files: int
    orphans: int


def table_sizes(lake: Lake) -> list[TableSize]:
    """Every table with its files."""
    return [
        TableSize(row["table_name"], row["file_count"], row["file_size_bytes"], _surplus(lake, row["table_name"]))
        for row in lake.rows(_TABLES)
    ]


def maintain(
    lake: WritableLake,
    *,
    keep_snapshots: timedelta = KEEP_SNAPSHOTS,
    keep_files: timedelta = KEEP_FILES,
    dry_run: bool = False,
) -> Work:
    """Do what is due, or only say what that is: then without the files of snapshots that would be expired.

    Raises LakeConflict if another writer came first; what was done until then stays done.
    """
    merged = [size.table for size in table_sizes(lake) if size.surplus >= _SURPLUS]
    snapshots = [row["snapshot_id"] for row in lake.rows(_EXPIRABLE, [datetime.now(UTC) - keep_snapshots])]
    if not dry_run:
        for table in merged:
            lake.rows(
                f"call ducklake_merge_adjacent_files('lake', '{table}', max_compacted_files => {_PARTITIONS_AT_ONCE},"
                f" max_file_size => {_SMALL_BYTES})"
            )
        if lake.rows("select count(*) as n from moves")[0]["n"] > _MOVES:
            _put_moves_together(lake)
        if snapshots:
            lake.rows(f"call ducklake_expire_snapshots('lake', versions => {snapshots})")
    which = f"dry_run => {dry_run}, older_than => timestamptz '{(datetime.now(UTC) - keep_files).isoformat()}'"
    return Work(
        merged=merged,
        snapshots=len(snapshots),
        files=len(lake.rows(f"call ducklake_cleanup_old_files('lake', {which})")),
        orphans=len(lake.rows(f"call ducklake_delete_orphaned_files('lake', {which})")),
    )


def _put_moves_together(lake: WritableLake) -> None:
    """Every commit reads them. A claim leaves one for each topic-partition, and a flush drops what it deleted."""
    lake.claim({})
    for table in ("moves", "owners"):
        lake.rows(f"call ducklake_flush_inlined_data('lake', table_name => '{table}')")


def _surplus(lake: Lake, table: str) -> int:
    """How many small files there are beyond one in each folder, that is for each partition."""
    [found] = lake.rows(
        "select count(*) - count(distinct parse_dirpath(data_file)) as n"
        f" from ducklake_list_files('lake', '{table}') where data_file_size_bytes < {_SMALL_BYTES}"
    )
    return int(found["n"])
