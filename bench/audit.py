"""How long the audit takes: the join recomputed in SQL, and compared, over millions of rows.

    python bench/audit.py                            10M rows: predictions, outcomes, ground truth
    python bench/audit.py --rows 1000000             a quick look

It makes a lake (SQLite catalog, local files) in a temporary folder: predictions of 60 days, nine of ten with an outcome
a few hours later, one in a hundred revised, the rest expired. The baseline reads every column of the same rows once.
Each runs in a process of its own, on all cores; the books must balance.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from machine import machine
from measure import in_process, peak_mib

from accrual.config import Config
from accrual.contract import load_contracts
from accrual.kafka import TopicNames
from accrual.lake import WritableLake, open_lake, open_lake_for_writing
from consumers.audit import audit
from consumers.recompute import Scope

CONTRACT = """
stream: tickets
inputs: {text: {type: string}}
output: {classes: [low, high]}
outcome: {values: {urgency: {type: string}}}
label: {field: urgency}
horizon: 1d
on_expiry: low
training: {template: '{text}', window_rows: 100000}
"""
PARTITIONS = 4
DAYS = 60

# Prediction n of {n}: partition n % 4, offset n / 4. $predictions, ... are numbers of rows.
_MADE = f"""
create temp table made as
select n, format('0199{{:08x}}-7000-8000-{{:012x}}', n, n * 7919) as prediction_id,
    n % {PARTITIONS} as "partition", n // {PARTITIONS} as "offset",
    timestamptz '2026-01-01' + to_microseconds((n / $n * {DAYS} * 86_400_000_000)::bigint) as predicted_at,
    predicted_at::date as day, now() - interval 1 hour as arrived_at,
    if(hash(n) % 10 < 9, predicted_at + to_seconds(3600 + hash(n) % 7200), null) as observed_at,
    if(hash(n) % 100 = 1, observed_at + interval 2 hours, null) as revised_at,
    format('{{{{"text":"ticket {{}} about {{}}"}}}}', n, repeat(hash(n)::varchar, 4)) as inputs,
    '{{"label":"low","probabilities":{{"low":0.75,"high":0.25}}}}' as output,
    if(hash(n) % 3 = 0, 'high', 'low') as label, if(hash(n) % 5 = 0, 'high', 'low') as revised
from range($n) t(n)
"""
_PREDICTIONS = """
insert into lake.predictions by name
select 'tickets' as stream, prediction_id, 'tickets@1' as model, predicted_at, inputs, output, day, "partition",
    "offset", arrived_at
from made order by n
"""
_OUTCOMES = """
insert into lake.outcomes by name
with said as (
    select prediction_id, observed_at, label, "partition", arrived_at, n from made where observed_at is not null
    union all
    select prediction_id, revised_at, revised, "partition", arrived_at, n from made where revised_at is not null
)
select 'tickets' as stream, prediction_id, observed_at, format('{{"urgency":"{}"}}', label) as "values",
    observed_at::date as day, "partition", row_number() over (partition by "partition" order by n) - 1 as "offset",
    arrived_at
from said
"""
_GROUND_TRUTH = """
insert into lake.ground_truth_history by name
with rows as (
    select *, 1 as revision, observed_at as seen_at, label as l from made where observed_at is not null
    union all select *, 2, revised_at, revised from made where revised_at is not null
    union all select *, 0, null, 'low' from made where observed_at is null and predicted_at < $expired
)
select 'tickets' as stream, prediction_id, revision, if(revision = 0, 'expired', 'labeled') as status, l as label,
    'tickets@1' as model, predicted_at, seen_at as observed_at, inputs, output,
    if(revision = 0, null, format('{{"urgency":"{}"}}', l)) as "values", day, "partition",
    row_number() over (partition by "partition" order by n) - 1 as "offset", arrived_at
from rows
"""
_MOVES = """
insert into lake.moves select ?, "partition", 0, max("offset") + 1 from {} group by all
"""


def main() -> None:
    """Make the lake, then audit it and read it."""
    given = _arguments()
    with tempfile.TemporaryDirectory(prefix="accrual-bench-", dir=given.folder) as folder:
        config = _settings(Path(folder))
        counts = in_process(_make, config, given.rows)
        print(
            f"{sum(counts.values()):,} rows: " + ", ".join(f"{n:,} {table}" for table, n in counts.items()), flush=True
        )
        reading = in_process(_read, config)
        audited = in_process(_audit, config)
    print("\n| | s | rows/s | to reading | peak RSS MiB |\n|---|---:|---:|---:|---:|")
    for name, (seconds, peak) in (("audit", audited), ("reading every column", reading)):
        rate = sum(counts.values()) / seconds
        print(f"| {name} | {seconds:.1f} | {rate:,.0f} | {seconds / reading[0]:.1f} | {peak:,.0f} |")
    print(f"\none round; {machine()}")


def _settings(folder: Path) -> Config:
    (folder / "contracts").mkdir()
    (folder / "contracts" / "tickets.yaml").write_text(CONTRACT)
    return Config(state=str(folder / "state"), contracts=str(folder / "contracts"))


def _make(config: Config, rows: int) -> dict[str, int]:
    names = TopicNames(config.topics.prefix)
    with open_lake_for_writing(config) as lake:
        lake.rows(_MADE, {"n": int(rows / 2.91)})
        last = lake.rows("select max(predicted_at) - interval 25 hour as expired from made")
        for statement, params in ((_PREDICTIONS, {}), (_OUTCOMES, {}), (_GROUND_TRUTH, last[0])):
            with lake.transaction():
                lake.rows(statement, params)
        topics = {
            "predictions": names.predictions,
            "outcomes": names.outcomes,
            "ground_truth_history": names.ground_truth,
        }
        for table, topic in topics.items():
            lake.rows(_MOVES.format(table), [topic])
        return {table: _count(lake, table) for table in topics}


def _count(lake: WritableLake, table: str) -> int:
    return int(lake.rows(f"select count(*) as n from {table}")[0]["n"])


def _audit(config: Config) -> tuple[float, float]:
    with open_lake(config) as newest:
        snapshot = newest.snapshot_id()
    with open_lake(config, at_snapshot=snapshot) as lake:
        contracts = load_contracts(Path(config.contracts))
        started = time.monotonic()
        found = audit(lake, contracts, TopicNames(config.topics.prefix), Scope())
        seconds = time.monotonic() - started
    if not found.balanced:
        sys.exit(f"the books do not balance: {found.differences[:5]} {found.balances[:3]} {found.coverage}")
    return seconds, peak_mib(os.getpid())


def _read(config: Config) -> tuple[float, float]:
    with open_lake(config) as lake:
        started = time.monotonic()
        for table in ("predictions", "outcomes", "ground_truth_history"):
            lake.rows(f"select bit_xor(hash(t)) from {table} t")
        return time.monotonic() - started, peak_mib(os.getpid())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the temporary files")
    return parser.parse_args()


if __name__ == "__main__":
    main()
