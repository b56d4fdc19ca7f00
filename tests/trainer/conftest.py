"""The world that the trainer's tests run in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.world import World, make_world


@pytest.fixture
def world(bootstrap: str, prefix: str, tmp_path: Path) -> World:
    """One of the test's own."""
    return make_world(bootstrap, prefix, tmp_path)
