"""The cache of the changelog: whatever happens to it, recovery makes it what the changelog says."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrual.config import Config, Kafka, Topics
from accrual.contract import Contract
from accrual.errors import BrokerUnavailable
from accrual.kafka import Producer, TopicNames, create_topics, delete_topics, topic_id, transactional_producer
from streams.join import Entry, Progress, Said, pack
from streams.recovery import changelog_bounds, is_current, recover
from streams.state import State, Timer, entry_key, progress_key

CONTRACT = msgspec.convert(
    {
        "stream": "toy",
        "inputs": {"x": {"type": "number"}},
        "output": {"classes": ["yes", "no"]},
        "outcome": {"values": {"answer": {"type": "string"}}},
        "label": {"field": "answer"},
        "horizon": "10s",
        "training": {"template": "{x}"},
    },
    Contract,
)
CONTRACTS = {"toy": CONTRACT}
HORIZON = CONTRACT.horizon_us
LATER = 2**60


def entry(number: int) -> Entry:
    return Entry(Said(number * 1_000_000, "toy@0", b'{"x": 1}', b"{}"))


def records(first: int, last: int) -> list[tuple[bytes, bytes | None]]:
    return [(entry_key("toy", f"id{n}"), pack(entry(n))) for n in range(first, last)]


@pytest.fixture
def config(bootstrap: str, prefix: str, tmp_path: Path) -> Config:
    made = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=2),
        state=str(tmp_path / "state"),
    )
    create_topics(made)
    return made


class Changelog:
    """Writes to the changelog's partition 0 in transactions; `end` is the position after the last record."""

    def __init__(self, config: Config, name: str = "writer") -> None:
        self.topic = TopicNames(config.topics.prefix).changelog
        self.id = topic_id(config, self.topic)
        self.end = 0
        self.producer: Producer = transactional_producer(config, f"{config.topics.prefix}.{name}")
        self.producer.init_transactions(30)

    def begin(self, some: list[tuple[bytes, bytes | None]]) -> None:
        self.producer.begin_transaction()
        for key, value in some:
            self.producer.produce(self.topic, value, key, 0, on_delivery=self._delivered)
        self.producer.flush(30)

    def write(self, some: list[tuple[bytes, bytes | None]]) -> None:
        self.begin(some)
        self.producer.commit_transaction(30)

    def _delivered(self, error: object, message: object) -> None:
        assert error is None
        self.end = message.offset() + 1  # type: ignore[attr-defined]


def ids(state: State, count: int) -> set[str]:
    keys = sorted(entry_key("toy", f"id{n}") for n in range(count))
    return {key.decode().partition("/")[2] for key, found in state.entries(keys).items() if found is not None}


def timers(state: State) -> set[str]:
    return set(state.due("toy", LATER, 1000).ids)


def names(first: int, last: int) -> set[str]:
    return {f"id{n}" for n in range(first, last)}


def recovered(config: Config, path: Path, changelog_id: str) -> State:
    state = State(path, changelog_id, CONTRACTS)
    recover(config, {0: state}, changelog_bounds(config, [0]), threading.Event())
    return state


def test_a_new_cache_is_replayed_from_the_beginning_with_its_timers(config: Config, tmp_path: Path) -> None:
    changelog = Changelog(config)
    changelog.write([*records(0, 50), (progress_key("toy"), pack(Progress(7, 8, 6)))])
    changelog.write([(entry_key("toy", "id3"), None)])
    state = recovered(config, tmp_path / "0", changelog.id)
    assert ids(state, 60) == names(0, 50) - {"id3"}
    assert timers(state) >= names(0, 50) - {"id3"}
    assert state.progress == {"toy": Progress(7, 8, 6)}
    assert state.offset == changelog.end
    due = state.due("toy", 12_000_000, 1000)
    assert due.ids == ["id0", "id1", "id2"]
    assert due.later[0] == ("toy", 14_000_000, "id4")
    state.close()


def test_a_state_that_stayed_open_is_current_until_anything_but_the_mark_of_its_commit_follows(
    config: Config, tmp_path: Path
) -> None:
    changelog = Changelog(config)
    changelog.write(records(0, 5))
    state = State(tmp_path / "0", changelog.id, CONTRACTS)
    assert not is_current(state, changelog_bounds(config, [0])[0])
    state.save(records(0, 5), changelog.end, {})
    assert is_current(state, changelog_bounds(config, [0])[0])
    changelog.write(records(5, 6))
    assert not is_current(state, changelog_bounds(config, [0])[0])
    assert not is_current(state, (state.offset + 1, state.offset + 1))  # records were deleted
    assert not is_current(state, (0, state.offset - 1))  # the end was cut off
    state.close()


def test_a_cache_that_lost_its_memory_is_what_the_changelog_was_at_its_position(config: Config, tmp_path: Path) -> None:
    """What `kill -9` leaves: without a write-ahead log, what was flushed; here the first of two batches."""
    changelog = Changelog(config)
    path = tmp_path / "0"
    state = State(path, changelog.id, CONTRACTS)
    changelog.write(records(0, 20))
    state.save(records(0, 20), changelog.end, {})
    state.close()
    at_first = changelog.end
    state = State(path, changelog.id, CONTRACTS)
    assert (state.offset, ids(state, 40)) == (at_first, names(0, 20))
    changelog.write(records(20, 40))
    state.save(records(20, 40), changelog.end, {})
    shutil.copytree(path, tmp_path / "killed")
    state.close()
    (tmp_path / "killed" / "LOCK").unlink()
    killed = State(tmp_path / "killed", changelog.id, CONTRACTS)
    assert (killed.offset, ids(killed, 40)) == (at_first, names(0, 20))
    recover(config, {0: killed}, changelog_bounds(config, [0]), threading.Event())
    assert (killed.offset, ids(killed, 40)) == (changelog.end, names(0, 40))
    killed.close()


def test_a_corrupted_cache_is_rebuilt(config: Config, tmp_path: Path) -> None:
    changelog = Changelog(config)
    changelog.write(records(0, 20))
    recovered(config, tmp_path / "0", changelog.id).close()
    (tmp_path / "0" / "CURRENT").write_text("garbage")
    state = recovered(config, tmp_path / "0", changelog.id)
    assert ids(state, 20) == names(0, 20)
    state.close()
    for table in (tmp_path / "0").glob("*.sst"):
        table.write_bytes(b"garbage")
    state = recovered(config, tmp_path / "0", changelog.id)
    assert ids(state, 20) == names(0, 20)
    state.close()


def test_a_cache_of_another_topic_or_beyond_the_end_is_dropped(config: Config, tmp_path: Path) -> None:
    changelog = Changelog(config)
    changelog.write(records(0, 20))
    recovered(config, tmp_path / "0", changelog.id).close()
    delete_topics(config)
    create_topics(config)
    new = Changelog(config, "writer-2")
    assert new.id != changelog.id
    new.write(records(20, 60))
    state = recovered(config, tmp_path / "0", new.id)
    assert ids(state, 60) == names(20, 60)
    state.save(records(0, 1), 10_000, {})
    recover(config, {0: state}, changelog_bounds(config, [0]), threading.Event())
    assert (ids(state, 60), state.offset) == (names(20, 60), new.end)
    state.close()


def test_a_cache_with_timers_by_another_horizon_is_dropped(config: Config, tmp_path: Path) -> None:
    changelog = Changelog(config)
    changelog.write(records(0, 3))
    recovered(config, tmp_path / "0", changelog.id).close()
    shorter = msgspec.structs.replace(CONTRACT, horizon="1s")
    state = State(tmp_path / "0", changelog.id, {"toy": shorter})
    recover(config, {0: state}, changelog_bounds(config, [0]), threading.Event())
    assert state.due("toy", 1_000_000, 10).ids == ["id0"]
    state.close()


@pytest.mark.parametrize("commits", [True, False])
def test_recovery_waits_for_the_transaction_that_another_worker_left_open(
    config: Config, tmp_path: Path, commits: bool
) -> None:
    changelog = Changelog(config)
    changelog.write(records(0, 10))
    changelog.begin(records(10, 20))
    state = State(tmp_path / "0", changelog.id, CONTRACTS)
    recovery = threading.Thread(
        target=recover, args=(config, {0: state}, changelog_bounds(config, [0]), threading.Event()), daemon=True
    )
    recovery.start()
    recovery.join(3)
    assert recovery.is_alive()
    assert ids(state, 20) == names(0, 10)
    if commits:
        changelog.producer.commit_transaction(30)
    else:
        changelog.producer.abort_transaction(30)
    recovery.join(20)
    assert not recovery.is_alive()
    assert ids(state, 20) == names(0, 20 if commits else 10)
    state.close()


def test_recovery_does_not_wait_for_ever_for_a_transaction_that_stays_open(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker says once that there is no more to read: who asks again hears it again."""
    monkeypatch.setattr("streams.recovery.HANGING_S", 3.0)
    monkeypatch.setattr("streams.recovery.ASKED_AGAIN_S", 0.5, raising=False)
    changelog = Changelog(config)
    changelog.write(records(0, 10))
    changelog.begin(records(10, 20))
    state, enough = State(tmp_path / "0", changelog.id, CONTRACTS), threading.Event()
    watch = threading.Timer(30, enough.set)
    watch.start()
    with pytest.raises(BrokerUnavailable, match=r"join-changelog \[0\]: a transaction is open at \d+ for 3 s"):
        recover(config, {0: state}, changelog_bounds(config, [0]), enough)
    watch.cancel()
    changelog.producer.commit_transaction(30)
    recover(config, {0: state}, changelog_bounds(config, [0]), threading.Event())
    assert ids(state, 20) == names(0, 20)
    state.close()


# What a partition does with its state: remember some ids (None: forget), let time pass, or be killed.
steps = st.one_of(
    st.dictionaries(st.integers(0, 30), st.one_of(st.none(), st.integers(0, 60)), min_size=1, max_size=6),
    st.integers(0, 90),
    st.just("killed"),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=25))
def test_it_is_what_the_changelog_says_and_no_timer_is_missed_whatever_happens(story: list[object]) -> None:
    """Small generations, so that they age all the time. An entry that time reached is moved to a later second."""
    log: list[tuple[bytes, bytes | None]] = []
    model: dict[str, int] = {}  # id → second of its prediction

    def commit(changes: dict[str, int | None], fired: list[bytes], timers: list[Timer]) -> None:
        some = [(entry_key("toy", id_), None if at is None else pack(entry(at))) for id_, at in changes.items()]
        earlier = [
            ("toy", at * 1_000_000 + HORIZON, id_)
            for id_, at in changes.items()
            if at is not None and at < model.get(id_, 0)
        ]
        at_least = min((at for at in changes.values() if at is not None), default=1000)
        log.extend(some)
        state.save(some, len(log), {"toy": at_least * 1_000_000 + HORIZON}, [*earlier, *timers], fired)
        for id_, at in changes.items():
            if at is None:
                model.pop(id_, None)
            else:
                model[id_] = at

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0"
        state = State(path, "topic", CONTRACTS, younger_keys=3)
        for number, step in enumerate(story):
            if isinstance(step, dict):
                commit({f"id{n}": at for n, at in step.items()}, [], [])
            elif isinstance(step, int):
                watermark = step * 1_000_000 + HORIZON
                found = state.due("toy", watermark, 1000)
                reached = {id_ for id_, at in model.items() if at <= step}
                assert reached <= set(found.ids)
                moved = {id_: model[id_] + (step + 1 if id_ in reached else 0) for id_ in model.keys() & set(found.ids)}
                again = [("toy", at * 1_000_000 + HORIZON, id_) for id_, at in moved.items()]
                commit({id_: moved[id_] for id_ in reached}, found.keys, [*found.later, *again])
            else:
                killed = Path(folder) / f"killed-{number}"
                shutil.copytree(path, killed, ignore=shutil.ignore_patterns("LOCK"))
                state.close()
                state = State(killed, "topic", CONTRACTS, younger_keys=3)
                path = killed
                state.save(log[state.offset :], len(log), {})
                state.flush()
            keys = [entry_key("toy", f"id{n}") for n in range(31)]
            seen = {id_: e.said.predicted_at // 1_000_000 for id_, e in _known(state, keys) if e.said is not None}
            assert seen == model
        state.close()


def _known(state: State, keys: list[bytes]) -> Iterator[tuple[str, Entry]]:
    for key, found in state.entries(keys).items():
        if found is not None:
            yield key.decode().partition("/")[2], found
