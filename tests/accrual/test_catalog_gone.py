"""A catalog that dies amid a statement is waited for, whatever the engine calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accrual.config import Config, Lake
from accrual.errors import LakeUnavailable
from accrual.lake import open_lake_for_writing


def test_postgres_that_dies_amid_a_session_is_transient(postgres: Any, postgres_catalog: str, tmp_path: Path) -> None:
    """Found by seed 596 of the sink's chaos suite: a BinderException ended the sink."""
    config = Config(state=str(tmp_path), lake=Lake(catalog=postgres_catalog, data=str(tmp_path / "data")))
    with open_lake_for_writing(config) as lake:
        database = postgres_catalog.rpartition("=")[2]
        with pytest.raises(LakeUnavailable, match="catalog went away"), lake.transaction():
            lake.rows("select count(*) from predictions")
            postgres.psql(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'")
            for table in ("predictions", "outcomes", "windows"):
                lake.rows(f"select count(*), min(stream) from {table} where stream <> 's'")
