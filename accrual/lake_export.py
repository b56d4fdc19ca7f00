"""A stream's ground truth as files for other tools: Parquet, JSON lines, or a data set of Hugging Face's `datasets`.

Rows are read from the stream's typed view and written as they come, so an export may be larger than memory. What is
written gets its name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from accrual.errors import NotFound
from accrual.lake import Lake
from accrual.lake_tables import view_of

_ROWS_A_FILE = 500_000  # of a data set
# One file, or with `hf-dataset` a folder that `datasets.load_dataset` reads.
ExportFormat = Literal["parquet", "jsonl", "hf-dataset"]

_FEATURES: dict[pa.DataType, str] = {
    pa.string(): "string",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.float64(): "float64",
    pa.bool_(): "bool",
    pa.date32(): "date32",
    pa.timestamp("us", "UTC"): "timestamp[us, tz=UTC]",
}


class SealedWindow(msgspec.Struct, frozen=True):
    """A sealed window of a stream, complete at `snapshot_id`."""

    window: int
    snapshot_id: int
    from_time: datetime
    to_time: datetime


class Export(msgspec.Struct, frozen=True):
    """The rows of `stream` for which `where`, a condition in SQL, holds; of one sealed window if given."""

    stream: str
    where: str = "true"
    window: SealedWindow | None = None

    @property
    def query(self) -> str:
        """The rows. `?`, twice, are `params`."""
        inside = "predicted_at >= ? and predicted_at < ? and " if self.window else ""
        return f'select * from lake."{view_of(self.stream)}" where {inside}({self.where})'

    @property
    def params(self) -> list[datetime]:
        """What the query's `?` stand for."""
        return [self.window.from_time, self.window.to_time] if self.window else []


def sealed_window(lake: Lake, stream: str, window: int) -> SealedWindow:
    """A sealed window by its number. Raises NotFound if there is none."""
    found = lake.rows('from windows where stream = ? and "window" = ?', [stream, window])
    if not found:
        raise NotFound(f"stream '{stream}' has no sealed window {window}; `accrual windows` lists them")
    return msgspec.convert(found[0], SealedWindow)


def shape_of(lake: Lake, export: Export) -> tuple[int, pa.Schema]:
    """How many rows an export has, and which columns.

    Raises NotFound if the stream has no view, LakeError if `where` is no condition over its columns.
    """
    name = view_of(export.stream)
    if not lake.rows("select 1 from duckdb_views() where database_name = 'lake' and view_name = ?", [name]):
        raise NotFound(f"the lake has no stream '{export.stream}': the sink makes its view {name} when it starts")
    schema = lake.arrow(f"{export.query} limit 0", export.params).schema
    rows = lake.rows(f"select count(*) as n from ({export.query})", export.params)[0]["n"]
    return rows, schema


def write(lake: Lake, export: Export, form: ExportFormat, to: Path, seen: Callable[[int], object]) -> int:
    """Write the export to `to`, in place of what is there; `seen` is told of the rows as they are written.

    Returns how many there were. Raises like `shape_of`; then `to` is as it was.
    """
    _, schema = shape_of(lake, export)
    batches = lake.batches(f"{export.query} order by predicted_at, prediction_id", export.params)
    written = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal written
        for batch in batches:
            yield batch
            written += batch.num_rows
            seen(batch.num_rows)

    with _in_place_of(to) as new:
        if form == "parquet":
            with pq.ParquetWriter(new, schema, compression="zstd") as file:
                for batch in counted():
                    file.write_batch(batch)
        elif form == "jsonl":
            with new.open("wb") as lines:
                for batch in counted():
                    lines.writelines(_line(row) for row in batch.to_pylist())
        else:
            _write_dataset(lake, export, new, schema, counted())
    return written


def _write_dataset(
    lake: Lake, export: Export, folder: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> None:
    """Parquet files below `data/`, and the card that says what they hold."""
    (folder / "data").mkdir(parents=True)
    file: pq.ParquetWriter | None = None
    files = rows = in_file = 0
    try:
        for batch in batches:
            if file is None or in_file >= _ROWS_A_FILE:
                if file is not None:
                    file.close()
                file = pq.ParquetWriter(folder / "data" / f"train-{files:05}.parquet", schema, compression="zstd")
                files, in_file = files + 1, 0
            file.write_batch(batch)
            in_file += batch.num_rows
            rows += batch.num_rows
        if file is None:  # a data set without rows has its columns all the same
            file = pq.ParquetWriter(folder / "data" / "train-00000.parquet", schema, compression="zstd")
    finally:
        if file is not None:
            file.close()
    (folder / "README.md").write_text(_card(export, schema, rows, lake.snapshot_id()), encoding="utf-8")


def _card(export: Export, schema: pa.Schema, rows: int, snapshot: int) -> str:
    """A data set's card; the header is JSON, which is YAML too."""
    header = {
        "pretty_name": f"Ground truth of {export.stream}",
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        "dataset_info": {"features": [_feature(field) for field in schema]},
    }
    which = f"sealed window {export.window.window}" if export.window else "all windows"
    return f"""---
{json.dumps(header, indent=1)}
---

# Ground truth of {export.stream}

{rows:,} predictions with what really happened, {which}, where `{export.where}`: the lake at snapshot {snapshot}.
`label` is the truth, `output` what the model said, `inputs` what it was given; `label` is null where it is censored.
"""


def _feature(field: pa.Field) -> dict[str, Any]:
    if pa.types.is_struct(field.type):
        return {"name": field.name, "struct": [_feature(part) for part in field.type]}
    return {"name": field.name, "dtype": _FEATURES.get(field.type, str(field.type))}


def _line(row: dict[str, Any]) -> bytes:
    return msgspec.json.encode(row) + b"\n"


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """A path beside `path`, which takes its place when the block ends well, and is removed when it does not."""
    new = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(new)
    try:
        yield new
        _remove(path)
        new.rename(path)
    finally:
        _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
