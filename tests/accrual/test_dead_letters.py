"""`accrual dead-letters` as a user runs it, against the topics of a real broker."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from accrual.cli import app
from accrual.config import Config, load_config
from accrual.dead_letters import ADVICE, REPLAYED
from accrual.events import MAX_EVENT_BYTES, REASONS, DeadLetter, encode
from accrual.kafka import Message, TopicNames, create_topics, partition_of, producer, read_to_end

PARTITIONS = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(bootstrap: str, prefix: str) -> Config:
    made = load_config({}, kafka={"bootstrap_servers": bootstrap}, topics={"prefix": prefix, "partitions": PARTITIONS})
    create_topics(made)
    return made


def letter(config: Config, **changes: Any) -> DeadLetter:
    fields: dict[str, Any] = {
        "reason": "unknown_stream",
        "detail": "stream 'returns' has no contract",
        "topic": TopicNames(config.topics.prefix).predictions,
        "partition": 1,
        "offset": 7,
        "key": b"p1",
        "value": b'{"prediction_id":"p1"}',
        "stream": "returns",
        "prediction_id": "p1",
    }
    return DeadLetter(**(fields | changes))


def file(config: Config, *values: DeadLetter | bytes) -> None:
    """Letters, or what is none, into the dead-letters topic, in this order."""
    client = producer(config, **{"message.max.bytes": 4 * MAX_EVENT_BYTES})
    for value in values:
        record = value if isinstance(value, bytes) else encode(value)
        client.produce(TopicNames(config.topics.prefix).dead_letters, record, partition=0)
    assert client.flush(30) == 0


def accrual(config: Config, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from accrual.cli import main; main()", "dead-letters", *arguments],
        cwd=ROOT,
        env={**os.environ, **config.environment(), "COLUMNS": "250"},
        input=said,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def listed(config: Config, *arguments: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["dead-letters", "list", "--format", "json", *arguments], env=config.environment())
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def replayed(config: Config) -> list[Message]:
    """What is in the input topics: here, only replays."""
    names = TopicNames(config.topics.prefix)
    return [message for topic in (names.predictions, names.outcomes) for message in read_to_end(config, topic)]


def test_list_filters_counts_and_says_what_is_left_out(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    assert accrual(config, "list").stdout == "0 dead letters.\n"
    before = datetime.now(UTC) - timedelta(seconds=1)
    file(
        config,
        letter(config),
        letter(config, prediction_id="p2", topic=names.outcomes, partition=2, offset=9),
        letter(config, reason="not_json", stream=None, prediction_id=None, detail="\x1b[2Jbroken"),
        letter(config, reason="late", stream="orders", topic=names.outcomes),
    )
    assert [row["offset"] for row in listed(config)] == [0, 1, 2, 3]
    assert [row["offset"] for row in listed(config, "--reason", "unknown_stream")] == [0, 1]
    assert [row["offset"] for row in listed(config, "--stream", "orders")] == [3]
    assert [row["offset"] for row in listed(config, "--prediction-id", "p2")] == [1]
    assert [row["offset"] for row in listed(config, "--topic", "outcomes")] == [1, 3]
    assert [row["offset"] for row in listed(config, "--topic", names.outcomes, "--stream", "returns")] == [1]
    assert [row["offset"] for row in listed(config, "--since", before.isoformat())] == [0, 1, 2, 3]
    assert listed(config, "--until", before.isoformat()) == []
    assert listed(config, "--since", "2999-01-01") == []
    [row] = listed(config, "--prediction-id", "p2")
    assert row["record"] == f"{names.outcomes}[2]@9"
    assert abs(datetime.fromisoformat(row["arrived_at"]) - datetime.now(UTC)) < timedelta(minutes=5)

    newest = accrual(config, "list", "--limit", "2")
    assert "4 dead letters: 2 unknown_stream, 1 not_json, 1 late. Not shown: 2 older (--limit)." in newest.stdout
    assert "\\x1b[2Jbroken" in newest.stdout
    assert "\x1b[2J" not in newest.stdout
    table = accrual(config, "list", "--limit", "2", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert [row["offset"] for row in rows] == ["2", "3"]
    assert "4 dead letters" in table.stderr


def test_a_wrong_filter_names_what_would_be_right(config: Config) -> None:
    wrong = accrual(config, "list", "--reason", "unknwon")
    assert (wrong.returncode, "unknown_stream" in wrong.stderr) == (2, True)
    wrong = accrual(config, "list", "--since", "yesterday")
    assert (wrong.returncode, "2026-05-01" in wrong.stderr) == (2, True)
    elsewhere = load_config({}, kafka={"bootstrap_servers": config.kafka.bootstrap_servers}, topics={"prefix": "none"})
    missing = accrual(elsewhere, "list")
    assert (missing.returncode, "accrual topics create" in missing.stderr) == (1, True)


def test_show_prints_the_original_and_what_to_do(config: Config) -> None:
    file(
        config,
        letter(config, value='{"note":"é"}'.encode()),
        b"no letter at all",
        letter(config, reason="not_json", key=None, value=b"\xff\x00"),
        letter(config, value=b"\x1b]0;title"),
    )
    shown = accrual(config, "show", "0").stdout
    assert '{"note":"é"}' in shown
    assert f"{TopicNames(config.topics.prefix).predictions}[1]@7" in shown
    assert REASONS["unknown_stream"] in shown
    assert ADVICE["unknown_stream"].todo in shown
    raw = accrual(config, "show", "2").stdout
    assert "ff00" in raw
    assert re.search(r"^key: +-$", raw, re.MULTILINE)
    assert b"\x1b]0;title".hex() in accrual(config, "show", "3").stdout
    for offset in ("1", "4", "99"):
        nothing = accrual(config, "show", offset)
        assert (nothing.returncode, f"there is no dead letter {offset}" in nothing.stderr) == (1, True)


def test_replay_writes_the_original_bytes_where_they_belong_once_confirmed(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    keys = [f"k{n}".encode() for n in range(20)]
    file(
        config,
        *(letter(config, key=key, value=b"\xff" + key, partition=0) for key in keys),
        letter(config, reason="not_json", key=None, value=None, topic=names.outcomes),
        letter(config, reason="orphan", stream="orders"),
    )
    tried = accrual(config, "replay", "--stream", "returns", "--reason", "unknown_stream", "--dry-run")
    assert (tried.returncode, "Would write 20 records" in tried.stdout) == (0, True)
    assert f"20 unknown_stream: {ADVICE['unknown_stream'].replayed}" in tried.stdout
    declined = accrual(config, "replay", "--stream", "returns", said="n\n")
    assert (declined.returncode, "Write 21 records again?" in declined.stdout) == (1, True)
    assert accrual(config, "replay", "--stream", "returns").returncode == 1, "nobody there to confirm"
    assert replayed(config) == []

    done = accrual(config, "replay", "--stream", "returns", said="y\n")
    assert (done.returncode, "Wrote 21 records again." in done.stdout) == (0, True)
    found = replayed(config)
    assert sorted((m.value(), m.key()) for m in found if m.key()) == sorted((b"\xff" + key, key) for key in keys)
    assert {m.topic() for m in found if m.key()} == {names.predictions}
    assert [m.value() for m in found if m.topic() == names.outcomes] == [None]
    for message in found:
        key = message.key()
        assert key is None or message.partition() == partition_of(key, PARTITIONS)
        assert set(dict(message.headers() or ())) == {REPLAYED}

    again = {row["offset"]: row["replayed_at"] for row in listed(config, "--replayed")}
    assert [offset for offset, at in again.items() if at is None] == [21]
    assert accrual(config, "replay", "0", "3", "--yes").returncode == 0
    assert len(replayed(config)) == 23
    assert len(listed(config)) == 22, "a replay adds nothing to the dead letters"


def test_what_cannot_be_replayed_is_refused_with_the_reason(config: Config) -> None:
    names = TopicNames(config.topics.prefix)
    file(
        config,
        letter(config, reason="too_large", value=b"x" * MAX_EVENT_BYTES, offset=41),
        letter(config, topic="elsewhere.predictions"),
        letter(config),
    )
    cut = accrual(config, "replay", "0", "--yes")
    assert cut.returncode == 1
    assert f"the whole record is at {names.predictions}[1]@41" in cut.stdout
    assert "none of them can be replayed" in cut.stderr
    assert "elsewhere.predictions, which is neither" in accrual(config, "replay", "1", "--yes").stdout
    assert "no dead letter that fits has the offset 9" in accrual(config, "replay", "2", "9", "--yes").stderr
    assert accrual(config, "replay", "--reason", "late", "--yes").returncode == 1
    assert (everything := accrual(config, "replay", "--yes")).returncode == 2
    assert "--reason unknown_stream" in everything.stderr
    assert replayed(config) == []
    assert accrual(config, "replay", "--stream", "returns", "--yes").stdout.count("is refused") == 2
    assert [message.key() for message in replayed(config)] == [b"p1"]


def test_the_largest_letter_is_replayed_whole(config: Config) -> None:
    value = b"x" * MAX_EVENT_BYTES
    file(config, letter(config, value=value))
    assert accrual(config, "replay", "0", "--yes").returncode == 0
    assert [message.value() for message in replayed(config)] == [value]


def test_every_reason_has_its_advice_and_its_line_in_the_documentation() -> None:
    assert list(ADVICE) == list(REASONS)
    page = (ROOT / "docs" / "dead-letters.md").read_text(encoding="utf-8")
    table = "\n".join(
        f"| `{reason}` | {meaning} | {ADVICE[reason].todo} | {ADVICE[reason].replayed} |"
        for reason, meaning in REASONS.items()
    )
    assert table in page, f"docs/dead-letters.md should have this table:\n{table}"
