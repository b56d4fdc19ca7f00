"""Predictions joined with their outcomes by stock Faust: two agents and a table in RocksDB. Started by `run.py`.

At least once: what Faust calls exactly once is broken upstream. The table keeps both sides of an id, so that an event
that comes twice is recognised.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import faust


def main() -> None:
    """Join until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bootstrap", "predictions", "outcomes", "output", "group", "state"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    sys.argv[1:] = []
    faust.Worker(join_app(given), loglevel="WARNING").execute_from_commandline()


def join_app(given: argparse.Namespace) -> faust.App:
    """The app of these topics."""
    app = faust.App(
        given.group,
        broker=f"kafka://{given.bootstrap}",
        store="rocksdb://",
        datadir=given.state,
        topic_partitions=4,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        producer_compression_type="lz4",
        web_enabled=False,
        autodiscover=False,
    )
    predictions = app.topic(given.predictions, key_type=str, value_serializer="json")
    outcomes = app.topic(given.outcomes, key_type=str, value_serializer="json")
    output = app.topic(given.output, key_type=str, value_serializer="json")
    known = app.Table("known", default=None, partitions=4, options={"driver": "rocksdict"})

    async def take(prediction_id: str, side: str, event: dict[str, Any]) -> None:
        entry = known.get(prediction_id) or {}
        if side in entry:
            return
        entry = {**entry, side: event}
        known[prediction_id] = entry
        if len(entry) == 2:
            await output.send(key=prediction_id, value=ground_truth(entry["said"], entry["seen"]))

    @app.agent(predictions)
    async def on_prediction(stream: faust.Stream) -> None:
        async for prediction_id, said in stream.items():
            await take(prediction_id, "said", said)

    @app.agent(outcomes)
    async def on_outcome(stream: faust.Stream) -> None:
        async for prediction_id, seen in stream.items():
            await take(prediction_id, "seen", seen)

    return app


def ground_truth(said: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """The joined row."""
    return {
        **said,
        "status": "labeled",
        "label": seen["values"]["intent"],
        "observed_at": seen["observed_at"],
        "values": seen["values"],
    }


if __name__ == "__main__":
    main()
