"""Files that only the catalog's keys open, and analysts who can only read."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from accrual.config import Config, Lake
from accrual.errors import AccrualError, LakeError
from accrual.lake import open_lake, open_lake_for_writing
from accrual.lake_tables import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"
SECRET = "the plain text of somebody"


def rows(count: int = 1) -> dict[str, pa.Table]:
    made = [{"stream": "s", "prediction_id": f"{SECRET} {n}", "inputs": SECRET} for n in range(count)]
    return {"predictions": pa.Table.from_pylist(made, TABLES["predictions"])}


def test_encrypted_files_are_read_by_the_lake_alone(tmp_path: Path) -> None:
    plain, encrypted = (Config(state=str(tmp_path / str(on)), lake=Lake(encrypted=on)) for on in (False, True))
    for config in (plain, encrypted):
        for _ in range(2):
            with open_lake_for_writing(config) as lake:
                lake.append(rows())
        files = list(Path(config.lake_data).rglob("*.parquet"))
        assert len(files) == 2
        hidden = config is encrypted
        assert all((SECRET.encode() in file.read_bytes()) != hidden for file in files)
        for file in files:
            if hidden:
                with pytest.raises((OSError, pa.ArrowException)):
                    pq.ParquetFile(file).read()
            else:
                assert pq.ParquetFile(file).read().num_rows == 1
        with open_lake(Config(state=config.state)) as lake:
            assert [row["inputs"] for row in lake.rows("from predictions")] == [SECRET] * 2


def test_a_lake_is_encrypted_from_its_making_or_never(tmp_path: Path) -> None:
    for made, opened in ((True, False), (False, True)):
        state = str(tmp_path / str(made))
        open_lake_for_writing(Config(state=state, lake=Lake(encrypted=made))).close()
        with pytest.raises(AccrualError, match="encrypt"):
            open_lake_for_writing(Config(state=state, lake=Lake(encrypted=opened)))


def test_an_analysts_role_reads_and_writes_nothing(
    postgres: Any, postgres_catalog: str, prefix: str, tmp_path: Path
) -> None:
    owner = Config(state=str(tmp_path), lake=Lake(catalog=postgres_catalog, data=str(tmp_path / "data")))
    role = f"analyst_{prefix}"
    grants = re.findall(r"^```sql\n(create role.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    with open_lake_for_writing(owner) as lake:
        lake.append(rows(3))
        postgres.psql(f"\\c {prefix}\n{grants.replace('analyst', role)}")
        lake.append(rows(2))
    catalog = postgres_catalog.replace("user=postgres", f"user={role} password='change me'")
    analyst = Config(state=str(tmp_path), lake=Lake(catalog=catalog, data=str(tmp_path / "data")))
    with open_lake(analyst) as lake:
        assert lake.rows("select count(*) as n from predictions") == [{"n": 5}]
        assert lake.rows("from accuracy_by_version")
        with pytest.raises(LakeError, match="read-only"):
            lake.rows("delete from predictions")
    with pytest.raises(AccrualError, match=r"(?i)permission denied"):
        open_lake_for_writing(analyst)
    postgres.psql(f"\\c {prefix}\ncreate table later as select 1 as x")  # as DuckLake does of its own accord
    as_analyst = f"\\set ON_ERROR_STOP on\n\\c {prefix} {role}\n"
    for refused in ("delete from ducklake_snapshot", "update ducklake_data_file set path = ''", "create table mine ()"):
        postgres.psql(f"{as_analyst}select count(*) from ducklake_snapshot, later")
        with pytest.raises(subprocess.CalledProcessError):
            postgres.psql(f"{as_analyst}{refused}")
    with open_lake(owner) as lake:
        assert lake.rows("select count(*) as n from predictions") == [{"n": 5}]
