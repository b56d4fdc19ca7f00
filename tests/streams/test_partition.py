"""A partition's turns on the real state: batches in any cut, time and crashes between give what the join gives."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from accrual.contract import Contract
from accrual.events import (
    DeadLetter,
    GroundTruth,
    Outcome,
    Prediction,
    Tick,
    decode_ground_truth,
    encode,
    instant,
    microseconds,
)
from accrual.kafka import TopicNames, partition_of
from streams.join import Entry, apply_outcome, apply_prediction, ground_truth, is_pending, seen_of
from streams.partition import Partition
from streams.state import State, entity_key, entry_key
from streams.turn import Arrival, Arrivals, Drained

HOUR = 3_600_000_000
START = 490_000 * HOUR
CONTRACT = msgspec.convert(
    {
        "stream": "toy",
        "inputs": {"x": {"type": "number"}},
        "output": {"classes": ["yes", "no"]},
        "outcome": {"values": {"answer": {"type": "string"}}},
        "label": {"field": "answer", "complete_when": 2},
        "horizon": "10h",
        "disorder": "1h",
        "remember": "1000h",
        "late": "revise",
        "idle": "1h",
        "training": {"template": "{x}"},
    },
    Contract,
)
CONTRACTS = {"toy": CONTRACT}
ALL_READ = Drained(predictions=True, outcomes=True)


def prediction(number: int) -> Prediction:
    return Prediction(
        prediction_id=f"id{number}",
        stream="toy",
        model="toy@0",
        predicted_at=instant(START + number * HOUR),
        inputs=msgspec.Raw(b'{"x":1}'),
        output=msgspec.Raw(b'{"label":"yes","probabilities":{"yes":1}}'),
    )


def outcome(number: int, hour: int, answer: str) -> Outcome:
    return Outcome(
        prediction_id=f"id{number}",
        stream="toy",
        observed_at=instant(START + hour * HOUR),
        values=msgspec.Raw(encode({"answer": answer})),
    )


# Within what the contract promises: time goes too little on for an outcome to be given up before its prediction came.
numbers = st.integers(0, 11)
events = st.one_of(st.builds(prediction, numbers), st.builds(outcome, numbers, numbers, st.sampled_from(["yes", "no"])))
# What happens to a partition: a batch comes, or its worker is killed and another takes over from the changelog.
happenings = st.lists(st.one_of(st.lists(events, max_size=8), st.just("killed")), max_size=12)


class World:
    """One partition, the changelog it writes, and the rows that are committed."""

    def __init__(self, folder: Path, contract: Contract = CONTRACT) -> None:
        self.rows: list[GroundTruth] = []
        self.letters: list[DeadLetter] = []
        self.came: list[Prediction | Outcome] = []
        self.partition: Partition
        self._folder = folder
        self._contracts = {contract.stream: contract}
        self.log: list[tuple[str, bytes | None, bytes]] = []  # topic, key and value of all that was read and written
        self._changelog: list[tuple[bytes, bytes | None]] = []
        self._ends: Counter[str] = Counter()
        self._lives = 0
        self.start()

    def start(self) -> None:
        """A worker with an empty disk."""
        self._lives += 1
        state = State(self._folder / str(self._lives), "topic", self._contracts, younger_keys=4)
        state.save(self._changelog, len(self._changelog), {})
        state.flush()
        self.partition = Partition(0, 1, state, self._contracts, TopicNames("test"))

    def kill(self) -> None:
        """Its disk is lost."""
        self.partition.state.close()
        shutil.rmtree(self._folder / str(self._lives))
        self.start()

    def turn(self, batch: list[Prediction | Outcome], *ticks: Tick, now: float = 0.0) -> list[Tick]:
        """Join a batch and commit it."""
        arrivals = Arrivals(ticks=list(ticks))
        for event in batch:
            topic, some = "outcomes", arrivals.outcomes if event.entity is None else arrivals.claims
            if isinstance(event, Prediction):
                topic, some = "predictions", arrivals.predictions
            at = event.predicted_at if isinstance(event, Prediction) else event.observed_at
            id_ = (event.entity or event.prediction_id or "").encode()
            key = (
                entry_key("toy", event.prediction_id) if event.prediction_id else entity_key("toy", event.entity or "")
            )
            some.append(Arrival(key, id_, self._ends[topic], event, microseconds(at), encode(event)))
            self._ends[topic] += 1
            self.log.append((topic, id_, encode(event)))
        for tick in ticks:
            self._ends["predictions"] += 1
            self.log.append(("predictions", b"toy", encode(tick)))
        self.came += [a.event for a in (*arrivals.predictions, *arrivals.outcomes, *arrivals.claims)]
        turn = self.partition.turn(arrivals, ALL_READ, now)
        self._changelog += turn.records
        self.rows += [decode_ground_truth(row) for _, row in turn.rows]
        self.letters += turn.letters
        self.log += [("ground_truth", *row) for row in turn.rows]
        self.log += [("dead_letters", letter.key, encode(letter)) for letter in turn.letters]
        self.partition.stands_at = len(self._changelog)
        self.partition.save(turn)
        return turn.ticks

    @property
    def pending(self) -> int:
        progress = self.partition.state.progress.get("toy")
        return 0 if progress is None else progress.pending


def current(rows: list[GroundTruth]) -> dict[str, GroundTruth]:
    return {row.prediction_id: row for row in sorted(rows, key=lambda row: row.revision)}


def labeled_one_by_one(came: list[Prediction | Outcome]) -> Iterator[GroundTruth]:
    """The labeled rows of the same events given to the pure join one at a time, without time passing."""
    entries: dict[str, Entry | None] = {}
    for event in came:
        before = entries.get(event.prediction_id)
        if isinstance(event, Prediction):
            step = apply_prediction(before, CONTRACT, event, microseconds(event.predicted_at), 0, b"", 0)
        else:
            step = apply_outcome(before, CONTRACT, seen_of(CONTRACT, event, microseconds(event.observed_at)), 0, b"")
        entries[event.prediction_id] = step.entry
        if step.row is not None:
            yield decode_ground_truth(ground_truth(step.row, CONTRACT, event.prediction_id))


@settings(max_examples=60, deadline=None)
@given(happenings)
def test_batches_time_and_crashes_change_no_label(story: list[object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for happening in story:
            if isinstance(happening, list):
                world.turn(happening)
            else:
                world.kill()
            known = [world.partition.known(f"id{n}").get("toy") for n in range(12)]
            assert world.pending == sum(entry is not None and is_pending(entry, CONTRACT) for entry in known)
        far = Tick(tick="toy", at=instant(START + 500 * HOUR))
        world.turn([], far)
        world.turn([])
        expected = current(list(labeled_one_by_one(world.came)))
        found = current(world.rows)
        predicted = {event.prediction_id for event in world.came if isinstance(event, Prediction)}
        assert {id_: row for id_, row in found.items() if row.status == "labeled"} == expected
        assert found.keys() == predicted, "each is labeled or expired"
        assert max(Counter((row.prediction_id, row.revision) for row in world.rows).values(), default=1) == 1
        assert world.pending == 0
        world.partition.state.close()


def test_a_silent_stream_ticks_by_the_clock_once_it_is_heard_no_more(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert world.turn([prediction(0)], now=100.0) == []
    assert world.turn([], now=100.0 + 3599) == []
    [tick] = world.turn([], now=100.0 + 3600)
    assert tick == Tick(tick="toy", at=instant(START + HOUR))
    assert world.turn([], now=100.0 + 3601) == []
    world.turn([], tick, now=100.0 + 3602)
    progress = world.partition.state.progress["toy"]
    assert progress.watermark == START, "an hour later, less an hour of disorder"
    world.turn([prediction(1)], now=100.0 + 7000)
    assert world.turn([], now=100.0 + 7300) == [], "an event was heard"
    world.partition.state.close()


def test_a_stray_goes_to_its_home_and_leaves_nothing_behind(tmp_path: Path) -> None:
    state = State(tmp_path / "0", "topic", CONTRACTS)
    stray = next(prediction(n) for n in range(12) if partition_of(b"id%d" % n, 4) == 3)
    partition = Partition(0, 4, state, CONTRACTS, TopicNames("test"))
    id_ = stray.prediction_id.encode()
    arrival = Arrival(
        entry_key("toy", stray.prediction_id), id_, 7, stray, microseconds(stray.predicted_at), encode(stray)
    )
    turn = partition.turn(Arrivals(predictions=[arrival]), ALL_READ, 0.0)
    assert turn.strays == [(3, arrival)]
    assert (turn.records, turn.rows, turn.letters) == ([], [], [])
    state.close()
