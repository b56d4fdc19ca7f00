"""How long a worker needs to have a partition's pending predictions again, with an empty disk and with what it left.

    python bench/recovery.py                          a million pending predictions in one partition
    python bench/recovery.py --pending 100000         a quick look

It starts a development broker of its own in a temporary folder and writes the changelog that a worker would have. The
baseline is the least any recovery must do: read the same records. The state is compared with what was written.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from machine import machine

from accrual.broker import DevelopmentBroker
from accrual.config import Config, Kafka, Topics
from accrual.contract import load_contracts
from accrual.events import microseconds, new_prediction_id
from accrual.kafka import TopicNames, create_topics, read_to_end, topic_id, transactional_producer
from streams.join import Entry, Said, pack
from streams.recovery import changelog_bounds, recover
from streams.state import State, entry_key

STREAM = "support-intents"
INPUTS = b'{"text":"I still have not received my new card, I ordered over a week ago."}'
OUTPUT = b'{"label":"card_arrival","probabilities":{"card_arrival":0.7,"card_linking":0.1,"lost_or_stolen_card":0.2}}'


def main() -> None:
    """Write the changelog, recover twice, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pending", type=int, default=1_000_000, help="pending predictions (default: %(default)s)")
    pending = parser.parse_args().pending
    with tempfile.TemporaryDirectory() as folder:
        broker = DevelopmentBroker(Path(folder) / "broker")
        config = Config(
            kafka=Kafka(bootstrap_servers=broker.start().bootstrap),
            topics=Topics(prefix=f"bench-{uuid.uuid4().hex[:8]}", partitions=1),
        )
        try:
            create_topics(config)
            ids = _write(config, pending)
            rows = {
                "read only": _timed(lambda: _read(config)),
                "from an empty disk": _timed(lambda: _recover(config, Path(folder) / "state", ids)),
                "from what it left there": _timed(lambda: _recover(config, Path(folder) / "state", ids)),
            }
        finally:
            broker.stop()
    print(f"{pending:,} pending predictions of {len(INPUTS) + len(OUTPUT)} bytes of payload in one partition\n")
    print("| recovery | CPU s | wall s | to reading only |\n|---|---:|---:|---:|")
    for name, (cpu, wall) in rows.items():
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {cpu / rows['read only'][0]:.2f} |")
    print(f"\n{machine()}")


def _write(config: Config, pending: int) -> list[str]:
    topic = TopicNames(config.topics.prefix).changelog
    ids = [new_prediction_id() for _ in range(pending)]
    client = transactional_producer(config, "bench", **{"compression.type": "lz4"})
    client.init_transactions(30)
    now = microseconds(datetime.now(UTC))
    for start in range(0, pending, 20_000):
        client.begin_transaction()
        for number, id_ in enumerate(ids[start : start + 20_000], start):
            entry = Entry(Said(now + number * 1000, f"{STREAM}@0", INPUTS, OUTPUT))
            client.produce(topic, pack(entry), entry_key(STREAM, id_), 0)
        client.commit_transaction(60)
    return ids


def _read(config: Config) -> None:
    for _ in read_to_end(config, TopicNames(config.topics.prefix).changelog, timeout_s=120):
        pass


def _recover(config: Config, path: Path, ids: list[str]) -> None:
    """Recover, look at some, and leave it as a worker that stops does (the look and the leaving are counted, too)."""
    changelog = topic_id(config, TopicNames(config.topics.prefix).changelog)
    state = State(path, changelog, load_contracts(Path(config.contracts)))
    recover(config, {0: state}, changelog_bounds(config, [0]), threading.Event())
    some = [entry_key(STREAM, id_) for id_ in ids[:: max(1, len(ids) // 10_000)]]
    if missing := [key for key, entry in state.entries(some).items() if entry is None]:
        raise SystemExit(f"wrong: {len(missing)} of {len(some)} entries are not there")
    state.close()


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.monotonic()
    work()
    return time.process_time() - cpu, time.monotonic() - wall


if __name__ == "__main__":
    main()
