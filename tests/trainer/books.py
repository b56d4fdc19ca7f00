"""A lake that a test fills with ground truth itself, without a broker, and whose windows it seals."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from accrual.config import Config, load_config
from accrual.contract import Contract, load_contract
from accrual.lake import open_lake_for_writing
from accrual.lake_tables import TABLES

STREAM = "cases"
START = datetime(2025, 1, 1, tzinfo=UTC)
CONTRACT = """
stream: cases
inputs:
  text: {type: string}
  queue: {type: string, optional: true}
  held_out: {type: boolean, optional: true}
  acted_on: {type: boolean, optional: true}
  chance: {type: number, optional: true}
output: {classes: [good, bad]}
outcome: {values: {result: {type: string}}}
label: {field: result}
horizon: 1d
on_expiry: good
disorder: 0s
training: {template: "{text}", window_rows: 10, held_out: 0%s}
quality: {slices: [queue]}
"""


class Books:
    """Predictions and labels of one stream in a lake of their own; times are hours after START."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config: Config = load_config({}, state=str(folder / "state"), pii={"key": "00" * 32})
        self._offset = 0
        self._windows = 0
        self._from = START

    def contract(self, training: str = "") -> Contract:
        """The contract with further fields of `training`, as in YAML: `replay: 0, balance: equal`."""
        path = self.folder / "cases.yaml"
        path.write_text(CONTRACT % (f", {training}" if training else ""))
        return load_contract(path)

    def add(self, *cases: Mapping[str, Any]) -> None:
        """Each case has `id` and `at`; and `label`, `after`, `revision`, `text`, `inputs`, `said` where wanted.

        `after`: hours until the label came; None for one that expired. `label` None: it is still open.
        """
        predictions, history = [], []
        for case in cases:
            at = START + timedelta(hours=case["at"])
            inputs = {"text": case.get("text", f"text of {case['id']}"), **case.get("inputs", {})}
            p = case.get("said", 0.7)
            shared = {
                "stream": STREAM,
                "prediction_id": case["id"],
                "model": f"{STREAM}@0",
                "predicted_at": at,
                "day": at.date(),
                "inputs": msgspec.json.encode(inputs).decode(),
                "output": msgspec.json.encode({"label": "good", "probabilities": {"good": p, "bad": 1 - p}}).decode(),
                "partition": 0,
                "offset": self._offset,
            }
            self._offset += 1
            if case.get("revision", 1) <= 1:
                predictions.append(shared)
            if case.get("label") is not None:
                after = case.get("after", 1.0)
                history.append(
                    {
                        **shared,
                        "revision": case.get("revision", 0 if after is None else 1),
                        "status": "expired" if after is None else "labeled",
                        "label": case["label"],
                        "observed_at": None if after is None else at + timedelta(hours=after),
                    }
                )
        rows = {"predictions": predictions, "ground_truth_history": history}
        with open_lake_for_writing(self.config) as lake:
            lake.append({name: pa.Table.from_pylist(some, TABLES[name]) for name, some in rows.items() if some})

    def tick(self, hours: float) -> None:
        """Event time has come so far."""
        tick = {"stream": STREAM, "moment": START + timedelta(hours=hours), "partition": 0, "offset": self._offset}
        self._offset += 1
        with open_lake_for_writing(self.config) as lake:
            lake.append({"ticks": pa.Table.from_pylist([tick], TABLES["ticks"])})

    def seal(self, until: float, trainable: int = 10) -> None:
        """Seal the next window: the predictions from the end of the last one to `until`."""
        self._windows += 1
        to_time = START + timedelta(hours=until)
        with open_lake_for_writing(self.config) as lake:
            window = {
                "stream": STREAM,
                "window": self._windows,
                "snapshot_id": lake.snapshot_id(),
                "from_time": self._from,
                "to_time": to_time,
                "trainable": trainable,
                "coverage": 1.0,
                "reached": [self._offset],
                "sealed_at": datetime.now(UTC),
            }
            lake.append({"windows": pa.Table.from_pylist([window], TABLES["windows"])})
        self._from = to_time

    def put(self, table: str, *rows: Mapping[str, Any]) -> None:
        """Any rows of the stream into any table."""
        with open_lake_for_writing(self.config) as lake:
            lake.append({table: pa.Table.from_pylist([{"stream": STREAM, **row} for row in rows], TABLES[table])})
