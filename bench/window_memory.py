"""How much memory the trainer takes for a window of many rows: to choose from it, to learn from it, to be judged on it.

    python bench/window_memory.py                      100,000 rows
    python bench/window_memory.py --rows 10000000      needs 5 GB of disk; most of an hour on two busy cores

It makes two lakes (SQLite catalog, local files): each has a sealed window of labeled rows, with texts of some 300
characters, and a tenth as many rows before; the second lake has ten times as many as the first. One prediction was
erased, so each row is looked up among those that are left. Selection and judging run in a process of their own each.
What streams takes about as much memory for both.

Trained is as a cycle trains, from the selection to the frozen bundle, one epoch of the base's upper two layers: from as
many rows as the contract's `max_rows` lets in, and beside that from 1,000, which is what model and code take without
the rows. The states of the frozen layers lie in a file that is read and written. Training also says the most memory
that no file stands behind, such as libraries (sampled).

Judged is as a cycle judges, and three times as the models of one are, by a model that says the same of every row: it
takes neither memory nor time, so the figures are those of the rows alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import msgspec
import pyarrow as pa
from machine import machine
from measure import in_process, own_mib, peak_mib

from accrual.config import Config
from accrual.contract import Contract, load_contract
from accrual.lake import WritableLake, open_lake, open_lake_for_writing
from accrual.lake_tables import TABLES
from accrual.predictor import Predictor
from accrual.signing import load_or_make_signing_key
from trainer.evaluate import by_slice, calibration_error_of, gains_of, score_window
from trainer.gate import judge
from trainer.select import LAKE_MEMORY, Window, sealed_windows, select

CONTRACT = """
stream: tickets
inputs: {text: {type: string}, queue: {type: string}}
output: {classes: [low, high], prior: {low: 0.7, high: 0.3}}
outcome: {values: {urgency: {type: string}}}
label: {field: urgency}
horizon: 1d
on_expiry: low
training: {template: '{text}', window_rows: 100000, max_tokens: 32, epochs: 1}
quality: {slices: [queue]}
gate: {slices: {fields: [queue], most_loss: 0.05}}
"""
START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 11  # one of the window before, ten of the window

_DAY = """
insert into lake.ground_truth_history by name
select 'tickets' as stream, format('0199{:08x}-7000-8000-{:012x}', n, hash(n) % 1000000000000) as prediction_id,
    1 as revision, 'labeled' as status, if(hash(n) % 3 = 0, 'high', 'low') as label, 'tickets@1' as model,
    $start + to_microseconds((n - $first) * 86_400_000_000 // $rows) as predicted_at,
    predicted_at + to_seconds(3600 + hash(n) % 7200) as observed_at,
    format('{{"text":"ticket {} about {}","queue":"q{}"}}', n, repeat(hash(n)::varchar, 15), hash(n) % 12) as inputs,
    '{"label":"low","probabilities":{"low":0.75,"high":0.25}}' as output,
    format('{{"urgency":"{}"}}', label) as "values", predicted_at::date as day, 0 as "partition", n as "offset",
    now() as arrived_at
from range($first, $first + $rows) t(n)
"""
_PREDICTIONS = """
insert into lake.predictions by name
select stream, prediction_id, model, predicted_at, day, "partition", "offset", arrived_at
from lake.ground_truth_history where "offset" <> $erased
"""


class Cost(NamedTuple):
    """Of one process: `rows` it kept, wall seconds, its peak of resident memory, and of what no file stands behind."""

    rows: int
    seconds: float
    peak_mib: float
    own_mib: float | None = None


def main() -> None:
    """Make the lakes; open, choose, learn, judge."""
    given = _arguments()
    costs: dict[str, list[Cost]] = {}
    sizes = given.rows // 10, given.rows
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="accrual-bench-", dir=given.folder) as folder:
            config = _settings(Path(folder))
            in_process(_make, config, rows)
            for name, function in STEPS.items():
                costs.setdefault(name, []).append(in_process(function, config))
                print(f"{rows:,} rows, {name}: {costs[name][-1]}", flush=True)
    print("\n| | rows | kept | s | peak RSS MiB | to a tenth of the rows | not of a file |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (tenth, whole) in costs.items():
        for rows, cost in zip(sizes, (tenth, whole), strict=True):
            ratio = f"{cost.peak_mib / tenth.peak_mib:.2f}" if cost is whole else ""
            own = "" if cost.own_mib is None else f"{cost.own_mib:,.0f}"
            print(
                f"| {name} | {rows:,} | {cost.rows:,} | {cost.seconds:.1f} | {cost.peak_mib:,.0f} | {ratio} | {own} |"
            )
    print(f"\none round; {machine()}")


def _settings(folder: Path) -> Config:
    (folder / "contracts").mkdir()
    (folder / "contracts" / "tickets.yaml").write_text(CONTRACT)
    return Config(state=str(folder / "state"), contracts=str(folder / "contracts"))


def _make(config: Config, rows: int) -> Cost:
    from trainer.freeze import freeze_generation_0  # brings torch, which the other processes need not carry

    started = time.monotonic()
    a_day = rows // (DAYS - 1)
    with open_lake_for_writing(config) as lake:
        for day in range(DAYS):
            lake.rows(_DAY, {"start": START + timedelta(days=day), "first": day * a_day, "rows": a_day})
        lake.rows(_PREDICTIONS, {"erased": rows})
        lake.append({"erasures": pa.Table.from_pylist([{"stream": "tickets", "at": START}], TABLES["erasures"])})
        _seal(lake, 1, START, 1, a_day)
        _seal(lake, 2, START + timedelta(days=1), DAYS - 1, rows)
    key = load_or_make_signing_key(config.signing_key, config.public_key)
    freeze_generation_0(config.model_store, key, _contract(config), "minilm")
    return Cost(rows, time.monotonic() - started, peak_mib(os.getpid()))


def _seal(lake: WritableLake, window: int, begin: datetime, days: int, rows: int) -> None:
    sealed = {
        "stream": "tickets",
        "window": window,
        "snapshot_id": lake.snapshot_id(),
        "from_time": begin,
        "to_time": begin + timedelta(days=days),
        "trainable": rows,
        "coverage": 1.0,
        "reached": [rows],
        "sealed_at": datetime.now(UTC),
    }
    lake.append({"windows": pa.Table.from_pylist([sealed], TABLES["windows"])})


def _open(config: Config) -> Cost:
    started = time.monotonic()
    _newest_window(config)
    return Cost(0, time.monotonic() - started, peak_mib(os.getpid()))


def _select(config: Config) -> Cost:
    started = time.monotonic()
    window = _newest_window(config)
    with open_lake(config, at_snapshot=window.snapshot_id, memory=LAKE_MEMORY) as lake:
        selection = select(lake, _contract(config), [window], seed=1)
    return Cost(selection.new + selection.replayed, time.monotonic() - started, peak_mib(os.getpid()))


def _train(config: Config, most: int = 100_000) -> Cost:
    from trainer.backtest import apart
    from trainer.cycle import Trainer
    from trainer.publish import Said

    contract = _contract(config)
    contract = msgspec.structs.replace(contract, training=msgspec.structs.replace(contract.training, max_rows=most))
    alone = apart(config, Path(config.state) / str(most))  # what `judging` finds in the store is generation 0
    said, started = Said(), time.monotonic()
    with _sampled() as own:
        Trainer(alone, {contract.stream: contract}, said).next_step(contract.stream)
    [(run, _)] = said.begun(contract.stream)
    if run.state != "trained":
        raise SystemExit(f"not trained: {run.reason}")
    return Cost(run.rows_new + run.rows_replayed, time.monotonic() - started, peak_mib(os.getpid()), max(own))


def _train_a_few(config: Config) -> Cost:
    return _train(config, 1000)


@contextmanager
def _sampled() -> Iterator[list[float]]:
    """`own_mib` of this process, ten times a second."""
    found, done = [0.0], Event()

    def look() -> None:
        while not done.wait(0.1):
            found.append(own_mib(os.getpid()))

    thread = Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _judge(config: Config) -> Cost:
    contract, window = _contract(config), _newest_window(config)
    [bundle] = config.model_store.iterdir()
    predictor = Predictor.load(bundle, config)
    started = time.monotonic()
    scored = [score_window(config, contract, predictor, window) for _ in range(3)]
    ours, theirs, _ = ([one] for one in scored)
    gains = gains_of(ours, theirs)
    rise = calibration_error_of(ours) - calibration_error_of(theirs)
    judge(gains, 1, rise, contract.gate, by_slice(ours, gains))
    entries = [one.entry("run", "champion", START) for one in scored]
    return Cost(entries[0].rows, time.monotonic() - started, peak_mib(os.getpid()))


STEPS: dict[str, Callable[[Config], Cost]] = {
    "opening the lake": _open,
    "selection": _select,
    "training, 1,000 rows": _train_a_few,
    "training": _train,
    "judging": _judge,
}


def _contract(config: Config) -> Contract:
    return load_contract(Path(config.contracts) / "tickets.yaml")


def _newest_window(config: Config) -> Window:
    with open_lake(config) as lake:
        return sealed_windows(lake, "tickets")[-1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, metavar="N", help="in the window; default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
