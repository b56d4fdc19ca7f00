"""Predictions joined with their outcomes by Quix Streams: `join_interval`, exactly once. Started by `run.py`.

The time of an event is its topic's append time: `join_interval` finds an earlier record when the later one comes, and
so would miss an outcome that came before its prediction by event time.
"""

from __future__ import annotations

import argparse
from datetime import timedelta

from quixstreams import Application

HORIZON = timedelta(days=14)


def main() -> None:
    """Join until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bootstrap", "predictions", "outcomes", "output", "group", "state"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    app = Application(
        broker_address=given.bootstrap,
        consumer_group=given.group,
        state_dir=given.state,
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        commit_interval=0.2,
        producer_extra_config={"compression.type": "lz4"},
        loglevel="WARNING",
    )
    predictions = app.dataframe(app.topic(given.predictions, key_deserializer="str", value_deserializer="json"))
    outcomes = app.dataframe(app.topic(given.outcomes, key_deserializer="str", value_deserializer="json"))
    joined = predictions.join_interval(
        outcomes, on_merge=ground_truth, grace_ms=2 * HORIZON, backward_ms=HORIZON, forward_ms=HORIZON
    )
    joined.to_topic(app.topic(given.output, key_serializer="str", value_serializer="json"))
    app.run()


def ground_truth(said: dict, seen: dict) -> dict:
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
