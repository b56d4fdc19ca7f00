"""Several sinks on one lake, in the production shape: each record once, whichever of them dies, and when."""

import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest

from accrual.config import Config, Lake
from accrual.errors import LakeUnavailable
from tests.consumers.conftest import World
from tests.consumers.test_sink import ask, counts, start, wait_for_rows

pytestmark = pytest.mark.slow
TABLES = ("predictions", "outcomes", "ground_truth_history", "dead_letters")


@pytest.fixture
def config(config: Config, postgres_catalog: str, s3_bucket: tuple[str, str]) -> Config:
    """The production shape."""
    endpoint, bucket = s3_bucket
    lake = Lake(catalog=postgres_catalog, data=f"s3://{bucket}/lake", s3_endpoint=endpoint, s3_use_ssl=False)
    return msgspec.structs.replace(config, lake=lake)


@pytest.fixture
def sinks(kafka_world: World) -> Iterator[list[subprocess.Popen[str]]]:
    """Two of them; what the test leaves in the list is killed."""
    running = [start(kafka_world.config), start(kafka_world.config)]
    yield running
    for process in running:
        process.kill()
        process.wait()


def owners(config: Config) -> Counter[str]:
    return Counter(row["owner"] for row in ask(config, "from owners"))


@pytest.mark.timeout(600)
def test_killed_and_paused_at_random_moments_they_lose_nothing_and_repeat_nothing(
    kafka_world: World, sinks: list[subprocess.Popen[str]]
) -> None:
    world, chance = kafka_world, random.Random(3)
    expected = dict.fromkeys(TABLES, 0)
    for round_ in range(5):
        world.minutes(round_ * 2000, 2000)
        if round_ == 4:
            world.let_time_pass()
        expected = {table: expected[table] + more for table, more in counts(world).items()}
        world.publish()
        if round_ < 4:
            time.sleep(chance.uniform(1.0, 15.0))
            victim = sinks.pop(chance.randrange(2))
            if round_ == 2:  # it is believed dead, and comes back to commit what it had in hand
                victim.send_signal(signal.SIGSTOP)
                time.sleep(13.0)
                victim.send_signal(signal.SIGCONT)
                sinks.append(victim)
            else:
                victim.kill()
                victim.wait()
                sinks.append(start(world.config))
    wait_for_rows(world.config, expected, timeout_s=200)
    for table in ("predictions", "outcomes", "ground_truth_history"):
        [found] = ask(world.config, f'select count(distinct (partition, "offset")) as n from {table}')
        assert found["n"] == expected[table]
    until = time.monotonic() + 60
    while not (windows := ask(world.config, 'select "window" as w from windows')) and time.monotonic() < until:
        time.sleep(0.5)
    assert len({row["w"] for row in windows}) == len(windows) > 0


def test_they_share_the_partitions_and_one_that_leaves_hands_its_own_over(
    kafka_world: World, sinks: list[subprocess.Popen[str]]
) -> None:
    world = kafka_world
    dealt: Counter[str] = Counter()
    until = time.monotonic() + 90
    while time.monotonic() < until:
        try:
            dealt = owners(world.config)
        except LakeUnavailable:
            pass  # there is none yet
        if len(dealt) == 2:
            break
        time.sleep(0.5)
    assert len(dealt) == 2
    world.minutes(0, 500)
    expected = counts(world)
    world.publish()
    wait_for_rows(world.config, expected)
    leaving = sinks.pop()
    leaving.terminate()
    assert leaving.wait(30) == 0
    world.minutes(500, 500)
    expected = {table: expected[table] + more for table, more in counts(world).items()}
    world.publish()
    wait_for_rows(world.config, expected)
    assert len(owners(world.config)) == 1
