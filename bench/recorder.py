"""What one `Recorder.predict` costs its caller, beside librdkafka's own `produce` of the same bytes.

    python bench/recorder.py [--events 200000]

Needs a broker at `kafka.bootstrap_servers` (`accrual broker start`); makes topics of its own and leaves them. Prints
microseconds a call, the ratio to the baseline of the same run, and the machine. Rounds alternate, the median is shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid

from machine import machine

from accrual import Distribution, Recorder, load_config
from accrual.kafka import TopicNames, create_topics, producer

INPUTS = {"text": "I still have not received my new card, I ordered it over a week ago. Where is it?"}
OUTPUT = Distribution(label="card_arrival", probabilities={f"intent_{n}": 0.02 for n in range(10)})


def main() -> None:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000, help="events a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = load_config(topics={"prefix": f"bench-{uuid.uuid4().hex[:8]}"})
    create_topics(config)
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(_recorder(config, arguments.events))
        theirs.append(_produce(config, arguments.events))
    predict, produce = statistics.median(ours), statistics.median(theirs)
    print(f"Recorder.predict   {predict:6.2f} us a call (median of {arguments.rounds} x {arguments.events})")
    print(f"Producer.produce   {produce:6.2f} us a call (the baseline: the same bytes, already encoded)")
    print(f"ratio              {predict / produce:6.2f}")
    print(machine())


def _recorder(config: object, events: int) -> float:
    recorder = Recorder("support-intents", config, buffer_events=events + 1, buffer_mib=1024)  # type: ignore[arg-type]
    started = time.perf_counter()
    for _ in range(events):
        recorder.predict(INPUTS, OUTPUT, model="support-intents@1")
    seconds = time.perf_counter() - started
    recorder.close(60)
    if recorder.delivered != events:
        raise SystemExit(f"only {recorder.delivered} of {events} events were delivered")
    return seconds / events * 1e6


def _produce(config: object, events: int) -> float:
    topic = TopicNames(config.topics.prefix).predictions  # type: ignore[attr-defined]
    client = producer(config, **{"queue.buffering.max.messages": events + 1, "compression.type": "lz4"})  # type: ignore[arg-type]
    value = b"x" * 420
    started = time.perf_counter()
    for number in range(events):
        client.produce(topic, value, b"%032d" % number)
    seconds = time.perf_counter() - started
    client.flush(60)
    return seconds / events * 1e6


if __name__ == "__main__":
    main()
