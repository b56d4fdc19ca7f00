"""`kill -9` of any one worker at any moments, restarted by the supervisor, changes nothing in the final ground truth.

ACCRUAL_KILL_COUNT=20 repeats each with other moments (`make kill-tests COUNT=20`).
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from accrual import Recorder
from accrual.config import Config, Kafka, Topics
from accrual.errors import LakeUnavailable
from accrual.events import decode_dead_letter, decode_ground_truth
from accrual.kafka import TopicNames, create_topics, read_to_end
from accrual.lake import open_lake
from accrual.ledger import Run, decode_generation, decode_ledger_entry
from accrual.supervisor import Supervisor
from tests.system.toy import CONTRACT, Expected, emit, events

COMMANDS = {
    "join": ["-m", "streams", "worker", "--web-port", "0"],
    "monitor": ["-m", "streams", "monitor", "--web-port", "0"],
    "sink": ["-m", "consumers", "sink"],
    "trainer": ["-m", "trainer"],
}
REPEATS = range(int(os.environ.get("ACCRUAL_KILL_COUNT", "1")))

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.fixture
def config(bootstrap: str, prefix: str, tmp_path: Path) -> Config:
    (tmp_path / "contracts").mkdir()
    (tmp_path / "contracts" / "toy.yaml").write_text(CONTRACT)
    made = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=3),
        state=str(tmp_path / "state"),
        contracts=str(tmp_path / "contracts"),
    )
    create_topics(made)
    return made


class Killer:
    """Kills one worker at the given moments after the start; between them it only watches."""

    def __init__(self, supervisor: Supervisor, name: str, moments: list[float]) -> None:
        self.killed = 0
        self._supervisor = supervisor
        self._worker = supervisor.workers[name]
        self._moments = sorted(moments)
        self._start = time.monotonic()

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            self._supervisor.watch()
            due = self._moments and time.monotonic() - self._start > self._moments[0]
            if due and self._worker.process.poll() is None:
                self._worker.process.send_signal(signal.SIGKILL)
                self._worker.process.wait()  # or the next moment, if it has come too, would kill the same one again
                self._moments.pop(0)
                self.killed += 1
            if time.monotonic() >= end:
                return
            time.sleep(0.02)

    @property
    def done(self) -> bool:
        """Whether it was killed as often as it should be, and runs again."""
        return not self._moments and self._worker.restarts == self.killed


def ground_truth(config: Config) -> tuple[dict[str, tuple[str, str | None, int]], Counter[tuple[str, int]]]:
    """The row of the highest revision of each id, and how often each (id, revision) is in the topic."""
    rows: dict[str, tuple[str, str | None, int]] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for message in read_to_end(config, TopicNames(config.topics.prefix).ground_truth):
        row = decode_ground_truth(message.value() or b"")
        seen[row.prediction_id, row.revision] += 1
        if row.prediction_id not in rows or row.revision > rows[row.prediction_id][2]:
            rows[row.prediction_id] = (row.status, row.label, row.revision)
    return rows, seen


def dead_letters(config: Config) -> Counter[tuple[str, str]]:
    topic = TopicNames(config.topics.prefix).dead_letters
    letters = [decode_dead_letter(message.value() or b"") for message in read_to_end(config, topic)]
    return Counter((letter.reason, letter.prediction_id or "") for letter in letters)


def in_lake(config: Config) -> dict[str, tuple[str, str | None, int]]:
    try:
        with open_lake(config) as lake:
            found = lake.rows("select prediction_id, status, label, revision from ground_truth")
    except LakeUnavailable:
        return {}
    return {row["prediction_id"]: (row["status"], row["label"], row["revision"]) for row in found}


def differences(expected: object, found: object) -> list[object]:
    """What is not the same in two mappings: short enough to read in a failure."""
    assert isinstance(expected, dict) and isinstance(found, dict)
    keys = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
    return sorted((key, expected.get(key), found.get(key)) for key in keys)[:20]


def settle(config: Config, killer: Killer, expected: Expected, seconds: float) -> None:
    """Wait until topic and lake say what is expected, at most `seconds`; the asserts afterwards say what is missing."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        killer.wait(1.0)
        same_rows = ground_truth(config)[0] == expected.rows == in_lake(config)
        if killer.done and same_rows and dead_letters(config) == expected.dead_letters:
            return


def audit(config: Config) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consumers", "audit", "--wait", "60"],
        env={**os.environ, **config.environment()},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def live_through(config: Config, name: str, seed: int, predictions: int, seconds: float) -> int:
    """Run the loop, kill `name` three times, compare everything; returns how often it was killed."""
    rng = random.Random(f"{name} {seed}")
    sendings, tides, expected = events(predictions, seed)
    running = ["join", "sink", *({name} - {"join", "sink"})]
    with Supervisor(Path(config.state) / "logs", config.environment()) as supervisor:
        for worker in running:
            supervisor.start(worker, [sys.executable, *COMMANDS[worker]])
        killer = Killer(supervisor, name, [rng.uniform(1, seconds + 4) for _ in range(3)])
        with Recorder("toy", config) as recorder:
            emit(recorder, sendings, seconds, killer.wait)
            emit(recorder, tides, 1.0, killer.wait)
        settle(config, killer, expected, 90)
        rows, seen = ground_truth(config)
        assert not differences(expected.rows, rows)
        assert [key for key, count in seen.items() if count > 1] == [], "a row was emitted twice"
        assert not differences(expected.dead_letters, dead_letters(config))
        assert not differences(expected.rows, in_lake(config))
        found = audit(config)
        assert found.returncode == 0, found.stdout + found.stderr
        assert all(w.restarts == (killer.killed if n == name else 0) for n, w in supervisor.workers.items())
    return killer.killed


@pytest.mark.parametrize("seed", REPEATS)
@pytest.mark.parametrize("name", ["join", "sink", "monitor"])
def test_killed_at_any_moment(config: Config, name: str, seed: int) -> None:
    assert live_through(config, name, seed, predictions=600, seconds=8) == 3


@pytest.mark.parametrize("seed", REPEATS)
def test_a_killed_trainer_repeats_nothing_that_is_published(config: Config, seed: int) -> None:
    assert live_through(config, "trainer", seed, predictions=800, seconds=30) == 3
    names = TopicNames(config.topics.prefix)
    versions = [decode_generation(m.value() or b"").version for m in read_to_end(config, names.models)]
    assert versions and versions == sorted(set(versions)), "a version was published twice"
    entries = [decode_ledger_entry(m.value() or b"") for m in read_to_end(config, names.training)]
    ended = Counter(e.run_id for e in entries if isinstance(e, Run) and e.state in ("promoted", "rejected"))
    assert not [run_id for run_id, count in ended.items() if count > 1], "a run was concluded twice"
