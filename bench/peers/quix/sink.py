"""Kafka records into Parquet files by Quix Streams and its file sink, at least once. Started by `run.py`."""

from __future__ import annotations

import argparse
import os

from quixstreams import Application
from quixstreams.sinks.community.file.formats import ParquetFormat
from quixstreams.sinks.community.file.local import LocalFileSink


def main() -> None:
    """Write until terminated."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("bootstrap", "predictions", "outcomes", "group", "state"):
        parser.add_argument(f"--{name}", required=True)
    given = parser.parse_args()
    os.chdir(given.state)  # the sink takes folders by name only
    app = Application(
        broker_address=given.bootstrap,
        consumer_group=given.group,
        state_dir=given.state,
        auto_offset_reset="earliest",
        processing_guarantee="at-least-once",
        commit_interval=1.0,
        loglevel="WARNING",
    )
    for topic in (given.predictions, given.outcomes):
        rows = app.dataframe(app.topic(topic, key_deserializer="str", value_deserializer="json"))
        rows.sink(LocalFileSink(directory="data", format=ParquetFormat(compression="zstd")))
    app.run()


if __name__ == "__main__":
    main()
