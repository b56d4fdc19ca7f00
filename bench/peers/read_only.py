"""The least any worker must do: read the records in batches, decode them with the same checks, commit the offsets.

python bench/peers/read_only.py GROUP        with Accrual's configuration in ACCRUAL_* variables; ends on SIGTERM
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from accrual.config import load_config
from accrual.contract import load_contracts
from accrual.events import read_outcome, read_prediction
from accrual.kafka import TopicNames, consumer


def main() -> None:
    """Read until terminated."""
    config = load_config()
    names = TopicNames(config.topics.prefix)
    contracts = load_contracts(Path(config.contracts))
    reader = consumer(config, sys.argv[1], **{"enable.auto.offset.store": True})
    reader.subscribe([names.predictions, names.outcomes])
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: ended.append(number))
    while not ended:
        messages = reader.consume(20_000, 0.2)
        for message in messages:
            read = read_prediction if message.topic() == names.predictions else read_outcome
            read(message.value(), message.key(), message.timestamp()[1], contracts)
        if messages:
            reader.commit()
    reader.close()


if __name__ == "__main__":
    main()
