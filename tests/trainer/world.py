"""A stream whose windows a test seals itself, with a real lake and a real broker for the trainer to work on."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pyarrow as pa

from accrual.config import Config, load_config
from accrual.contract import Contract, load_contracts
from accrual.events import microseconds
from accrual.kafka import TopicNames, create_topics, read_to_end
from accrual.lake import open_lake_for_writing
from accrual.lake_tables import TABLES
from accrual.ledger import Evaluation, Generation, Run, decode_generation, decode_ledger_entry
from trainer.cycle import Trainer
from trainer.publish import Ledger

STREAM = "desk"
START = datetime(2025, 1, 1, tzinfo=UTC)
CONTRACT = """
stream: desk
inputs: {text: {type: string}}
output: {open: true, classes: [card_arrival, lost_or_stolen_card, exchange_rate, top_up_failed]}
outcome: {values: {intent: {type: string}}}
label: {field: intent}
horizon: 1d
training:
  {template: "{text}", window_rows: 60, held_out: 0, epochs: 1, max_tokens: 32, lora: {rank: 2, alpha: 4, layers: 1}}
gate: {alpha: 0.8, patience: 2, max_ece_increase: 1.0}
"""
BANKING = Path(__file__).parents[2] / "examples" / "data" / "banking77" / "train.csv"


class World:
    """A lake whose windows the test seals itself, and what was said on the topics."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.contracts: dict[str, Contract] = load_contracts(Path(config.contracts))
        classes = self.contracts[STREAM].output.classes
        with BANKING.open(encoding="utf-8", newline="") as file:
            rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
        by_class = [[row for row in rows if row[1] == name] for name in classes]
        self.rows = [row for several in zip(*by_class, strict=False) for row in several]  # text and label
        self._windows = 0

    def seal(self, rows: int = 60, relabel: Callable[[str], str] = str) -> None:
        """Seal the next window of `rows` labeled rows."""
        first = 60 * self._windows
        self._windows += 1
        since, until = START + timedelta(days=self._windows), START + timedelta(days=self._windows + 1)
        history = [
            {
                "stream": STREAM,
                "prediction_id": f"p-{first + n}",
                "revision": 1,
                "status": "labeled",
                "label": relabel(label),
                "model": f"{STREAM}@0",
                "predicted_at": since + timedelta(minutes=n),
                "inputs": msgspec.json.encode({"text": text}).decode(),
                "output": "{}",
                "partition": 0,
                "offset": first + n,
            }
            for n, (text, label) in enumerate(self.rows[first : first + rows])
        ]
        with open_lake_for_writing(self.config) as lake:
            if history:
                table = pa.Table.from_pylist(history, TABLES["ground_truth_history"])
                lake.append({"ground_truth_history": table})
            window = {
                "stream": STREAM,
                "window": self._windows,
                "snapshot_id": lake.snapshot_id(),
                "from_time": since,
                "to_time": until,
                "rows": rows,
                "labeled": rows,
                "trainable": rows,
                "coverage": 1.0,
                "digest": hashlib.sha256(str(microseconds(since)).encode()).hexdigest(),
                "sealed_at": until,
            }
            lake.append({"windows": pa.Table.from_pylist([window], TABLES["windows"])})

    def trainer(self) -> Trainer:
        return Trainer(self.config, self.contracts, Ledger(self.config))

    def finish(self) -> None:
        """Take every step there is, as a trainer that was just started."""
        trainer = self.trainer()
        while trainer.next_step(STREAM):
            pass

    def said(self) -> tuple[list[Run], list[Evaluation], list[Generation]]:
        names = TopicNames(self.config.topics.prefix)
        entries = [decode_ledger_entry(message.value() or b"") for message in read_to_end(self.config, names.training)]
        generations = [decode_generation(message.value() or b"") for message in read_to_end(self.config, names.models)]
        runs = [entry for entry in entries if isinstance(entry, Run)]
        return runs, [entry for entry in entries if isinstance(entry, Evaluation)], generations


def make_world(bootstrap: str, prefix: str, folder: Path) -> World:
    """Topics, an empty lake and the contract, in a folder of the test's own."""
    contracts = folder / "contracts"
    contracts.mkdir()
    (contracts / "desk.yaml").write_text(CONTRACT)
    config = load_config(
        {},
        kafka={"bootstrap_servers": bootstrap},
        topics={"prefix": prefix, "partitions": 1},
        state=str(folder / "state"),
        contracts=str(contracts),
    )
    create_topics(config)
    with open_lake_for_writing(config):
        pass
    return World(config)
