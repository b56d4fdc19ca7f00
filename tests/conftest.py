"""What every test may ask for: a real broker (`bootstrap`) and topics of its own (`prefix`)."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from types import FrameType

import pytest

from accrual.broker import DevelopmentBroker
from accrual.kafka import wait_until_ready


def pytest_configure() -> None:
    """Let a terminated run (CI's timeout, `kill`) tear its fixtures down as an interrupted one does.

    One compute thread: the tests share the cores with a broker and with workers, and more would wait for each other.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


@pytest.fixture(scope="session")
def bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap servers of one broker for the whole run: ACCRUAL_TEST_BOOTSTRAP, or a development broker of its own."""
    given = os.environ.get("ACCRUAL_TEST_BOOTSTRAP")
    if given:
        wait_until_ready(given, timeout_s=10)
        yield given
        return
    broker = DevelopmentBroker(tmp_path_factory.mktemp("broker"))
    running = broker.start()
    try:
        yield running.bootstrap
    finally:
        broker.stop()


@pytest.fixture
def prefix() -> str:
    """A topic prefix no other test uses, so that tests share a broker and nothing else."""
    return f"t{uuid.uuid4().hex[:12]}"
