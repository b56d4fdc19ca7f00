"""Select: which rows a challenger learns from, and which are kept back to calibrate it.

All rows of the new windows, the latest of them kept back, and a share of older rows so that what was learned is not
lost. Rows that are in quarantine, or were rejected, are none of them. The choice is a function of the lake's snapshot,
the contract and the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime

import msgspec

from accrual.contract import Contract
from accrual.lake import Lake
from trainer.held_out import HELD_OUT, held_out_below

KEPT_BACK = 0.12  # of the new rows, the latest: later than what is trained on, earlier than what judges


class Window(msgspec.Struct, frozen=True):
    """A sealed window: predictions of `from_time` up to `to_time`, as the lake shows them at `snapshot_id`."""

    stream: str
    window: int
    snapshot_id: int
    from_time: datetime
    to_time: datetime
    coverage: float


class Row(msgspec.Struct, frozen=True):
    """A labeled prediction, its inputs rendered to text. `slices` are the names of those of the gate that it is in."""

    prediction_id: str
    text: str
    label: str
    slices: tuple[str, ...] = ()


class Selection(msgspec.Struct, frozen=True):
    """`learn` holds new and replayed rows, `calibrate` the latest new ones; `digest` is over ids and labels of all."""

    learn: list[Row]
    calibrate: list[Row]
    replayed: int
    digest: str

    @property
    def new(self) -> int:
        """How many rows of the new windows there are, those kept back included."""
        return len(self.learn) - self.replayed + len(self.calibrate)


def sealed_windows(lake: Lake, stream: str) -> list[Window]:
    """The sealed windows of a stream that hold a row to learn from, in order."""
    found = lake.rows(
        'select stream, "window", snapshot_id, from_time, to_time, coverage from windows'
        ' where stream = ? and trainable > 0 order by "window"',
        [stream],
    )
    return msgspec.convert(found, list[Window])


def rows_of(lake: Lake, contract: Contract, windows: Sequence[Window]) -> list[Row]:
    """The labeled rows of consecutive windows, oldest first. `lake` is pinned to the last one's snapshot."""
    return _rows(
        contract,
        lake,
        "predicted_at >= ? and predicted_at < ? order by predicted_at, prediction_id",
        [windows[0].from_time, windows[-1].to_time],
    )


def held_out_rows(lake: Lake, contract: Contract, window: Window) -> list[Row]:
    """The rows of a window that no generation learns from. `lake` is pinned to the window's snapshot."""
    return _rows(
        contract,
        lake,
        f"{HELD_OUT} and predicted_at >= ? and predicted_at < ? order by predicted_at, prediction_id",
        [held_out_below(contract.training.held_out), window.from_time, window.to_time],
    )


def select(lake: Lake, contract: Contract, new: Sequence[Window], seed: int) -> Selection:
    """Choose, of the rows that are not held out, the newest and older ones.

    The newest `training.max_rows` of the new windows and, `training.replay` times as many, rows before them. `lake` is
    pinned to the last new window's snapshot.
    """
    learnable, below = f"not ({HELD_OUT}) and", held_out_below(contract.training.held_out)
    fresh = _rows(
        contract,
        lake,
        f"{learnable} predicted_at >= ? and predicted_at < ? order by predicted_at, prediction_id",
        [below, new[0].from_time, new[-1].to_time],
    )[-contract.training.max_rows :]
    kept_back = int(len(fresh) * KEPT_BACK)
    learn, calibrate = fresh[: len(fresh) - kept_back], fresh[len(fresh) - kept_back :]
    # An order that only id and seed decide: a sample that any engine draws again.
    wanted, ids = int(len(fresh) * contract.training.replay), {row.prediction_id for row in fresh}
    drawn = _rows(
        contract,
        lake,
        f"{learnable} predicted_at < ? order by md5(prediction_id || ?), prediction_id limit ?",
        [below, new[-1].to_time, f":{seed}", wanted + len(fresh)],
    )
    older = [row for row in drawn if row.prediction_id not in ids][:wanted]
    listed = "\n".join(f"{row.prediction_id}|{row.label}" for row in [*learn, *older, *calibrate])
    return Selection([*learn, *older], calibrate, len(older), hashlib.sha256(listed.encode()).hexdigest())


def _rows(contract: Contract, lake: Lake, condition: str, params: Sequence[object]) -> list[Row]:
    table = lake.arrow(
        "select prediction_id, inputs, label from ground_truth where stream = ? and label is not null"
        " and prediction_id not in (select prediction_id from quarantined where stream = ? and state <> 'released')"
        f" and {condition}",
        [contract.stream, contract.stream, *params],
    )
    return [
        Row(prediction_id, contract.render(read), label, contract.slices_of(read))
        for prediction_id, inputs, label in zip(*(column.to_pylist() for column in table.columns), strict=True)
        for read in [contract.decode_inputs(inputs.encode())]
    ]
