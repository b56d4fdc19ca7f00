"""What goes wrong around the trainer: it goes on, says what was wrong, and publishes nothing that it should not."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from accrual.bundle import drafted, read_manifest
from accrual.contract import load_contracts
from accrual.encoder import base_folder
from accrual.errors import BundleError, LedgerLost, StoreUnavailable
from accrual.kafka import TopicNames, create_topics, read_to_end
from accrual.lake import open_lake_for_writing
from accrual.lake_tables import TABLES
from consumers.rows import arrow_tables, readers
from tests.trainer.world import START, STREAM, World
from trainer import __main__ as loop
from trainer import cycle
from trainer.dry_run import foretell
from trainer.publish import Said

Keep = Callable[..., None]


class _Ended(BaseException):
    """The test has seen enough: ends a loop that has no end."""


@pytest.fixture
def keep_training(world: World, monkeypatch: pytest.MonkeyPatch) -> Keep:
    """The trainer's loop on the world. In place of each sleep comes the next of these actions; then it ends."""

    def keep(*actions: Callable[[], object], streams: tuple[str, ...] = (STREAM,)) -> None:
        pending = iter(actions)

        def sleep(_seconds: float) -> None:
            action = next(pending, None)
            if action is None:
                raise _Ended
            action()

        monkeypatch.setattr(loop, "time", SimpleNamespace(sleep=sleep))
        with pytest.raises(_Ended):
            loop.keep_training(world.config, world.contracts, streams, once=False)

    return keep


def states(world: World) -> list[tuple[int, str]]:
    """Version and state of all that was said of runs, in order."""
    return [(run.version, run.state) for run in world.said()[0]]


def another_stream(world: World) -> str:
    """Add a stream that has no data: all that it can do is publish its generation 0."""
    path = Path(world.config.contracts) / "desk.yaml"
    path.with_name("other.yaml").write_text(path.read_text().replace("stream: desk", "stream: other"))
    world.contracts = load_contracts(Path(world.config.contracts))
    return "other"


def test_a_champion_with_a_broken_adapter_is_said_and_holds_up_only_its_own_stream(
    world: World, keep_training: Keep, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        world.seal()
        world.finish()
    champion = world.said()[2][-1]
    assert champion.version == 1
    adapter = world.config.model_store / champion.bundle / "adapter" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:100])
    before = states(world)
    other = another_stream(world)
    world.seal()
    published: list[list[str]] = []
    keep_training(
        lambda: published.append([g.model for g in world.said()[2]]),
        lambda: adapter.write_bytes(whole),
        streams=(STREAM, other),
    )
    assert published == [["desk@0", "desk@1", "other@0"]], "the other stream came first to its right"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert said and all(
        "desk cannot go on" in line and "adapter_model.safetensors was altered" in line for line in said
    )
    after = states(world)[len(before) :]
    assert after and after[0][0] == 2 and after[0][1] != "failed", "mended, it goes on with the window it had"


def test_once_ends_with_what_is_broken_when_the_other_streams_are_through(world: World) -> None:
    world.seal()
    world.finish()
    world.seal()
    [challenger] = world.said()[0]
    (world.config.model_store / (challenger.digest or "") / "head.safetensors").unlink()
    other = another_stream(world)
    champion = world.config.model_store / world.said()[2][-1].bundle
    (champion / "labels.json").rename(world.config.model_store / ".labels.away")
    with pytest.raises(BundleError, match=r"labels\.json is missing"):
        loop.keep_training(world.config, world.contracts, (STREAM, other), once=True)
    assert [g.model for g in world.said()[2]] == ["desk@0", "other@0"]
    assert states(world) == [(1, "trained")], "nothing is concluded about it while there is nothing to compare it with"
    (world.config.model_store / ".labels.away").rename(champion / "labels.json")
    loop.keep_training(world.config, world.contracts, (STREAM, other), once=True)
    runs = world.said()[0]
    assert [(run.version, run.state) for run in runs] == [(1, "trained"), (1, "failed"), (2, "trained")]
    assert "head.safetensors is missing" in runs[1].reason


def test_topics_that_were_lost_put_no_generation_0_into_service_again(world: World) -> None:
    """The lake knows what was published. Of another stream it knows nothing: that begins."""
    world.seal()
    world.finish()
    names, other = TopicNames(world.config.topics.prefix), another_stream(world)
    tables, _ = arrow_tables(list(read_to_end(world.config, names.models)), readers(names, world.contracts))
    with open_lake_for_writing(world.config) as lake:
        lake.append(tables)
    topics = msgspec.structs.replace(world.config.topics, prefix=f"{world.config.topics.prefix}-new")
    world.config = msgspec.structs.replace(world.config, topics=topics)
    create_topics(world.config)
    with pytest.raises(LedgerLost, match="know no model of desk, and the lake knows desk@0"):
        loop.keep_training(world.config, world.contracts, (STREAM, other), once=True)
    with pytest.raises(LedgerLost):
        foretell(world.config, Said(), world.contracts[STREAM], by_hand=False)
    assert [g.model for g in world.said()[2]] == ["other@0"]


def test_a_base_model_that_is_gone_is_said_until_it_is_back(
    world: World, keep_training: Keep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    base.symlink_to(base_folder("minilm"))
    world.config = msgspec.structs.replace(
        world.config, models=msgspec.structs.replace(world.config.models, base=str(base))
    )
    world.finish()
    base.unlink()
    world.seal()
    seen: list[list[tuple[int, str]]] = []
    keep_training(lambda: seen.append(states(world)), lambda: base.symlink_to(base_folder("minilm")))
    assert seen == [[]]
    assert any(f"base model '{base}' is neither" in record.getMessage() for record in caplog.records)
    assert states(world) == [(1, "trained")]


@pytest.mark.parametrize("at", ["look", "train"])
def test_a_lake_that_goes_away_is_waited_for(
    world: World, keep_training: Keep, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """When the trainer looks for windows, or when it has decided to train on one."""
    world.finish()
    world.seal()
    catalog = Path(world.config.lake_catalog.removeprefix("sqlite:"))
    away = catalog.with_suffix(".away")
    plan = cycle.plan_of

    def go_away(*arguments: Any, **named: Any) -> Any:
        found = plan(*arguments, **named)
        if found.step == "train" and not states(world) and not away.exists():
            catalog.rename(away)
        return found

    if at == "look":
        catalog.rename(away)
    else:
        monkeypatch.setattr(cycle, "plan_of", go_away)
    seen: list[list[tuple[int, str]]] = []

    def come_back() -> None:
        monkeypatch.setattr(cycle, "plan_of", plan)
        seen.append(states(world))
        away.rename(catalog)

    keep_training(come_back)
    assert seen == [[]]
    assert states(world) == [(1, "trained")]


@pytest.mark.parametrize("is_open", [True, False])
def test_a_label_that_the_contract_does_not_know_becomes_a_class_only_where_it_is_open(
    world: World, is_open: bool
) -> None:
    """The join refuses such labels while a contract is closed; they are in the lake of one that was not always."""
    contract = world.contracts[STREAM]
    output = msgspec.structs.replace(contract.output, open=is_open)
    world.contracts[STREAM] = msgspec.structs.replace(contract, output=output)
    world.rows = [(text, "lost_pin" if n % 10 == 3 else label) for n, (text, label) in enumerate(world.rows)]
    for _ in range(2):
        world.seal()
        world.finish()
    runs, evaluations, _ = world.said()
    assert (runs[0].state, runs[1].version) == ("trained", 1)
    labels = msgspec.json.decode((world.config.model_store / (runs[0].digest or "") / "labels.json").read_bytes())
    assert labels == [*contract.output.classes, *(["lost_pin"] if is_open else [])]
    assert runs[0].selection.get("outside", 0) == (0 if is_open else 6)
    assert {e.rows for e in evaluations} == {60 if is_open else 54}


def test_a_window_with_one_label_is_a_recorded_failure_and_the_loop_goes_on(world: World) -> None:
    world.seal(relabel=lambda _label: "card_arrival")
    world.finish()
    [run] = world.said()[0]
    assert (run.state, run.digest) == ("failed", None)
    assert "1 label(s): nothing to tell apart" in run.reason
    world.seal()
    world.finish()
    assert states(world)[-1] == (2, "trained")
    assert [g.version for g in world.said()[2]] == [0]


@pytest.mark.parametrize("kind", [ValueError, KeyError])
def test_what_nobody_foresaw_in_a_training_is_a_recorded_failure(
    kind: type[Exception], world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_such_base(*_: object, **__: object) -> None:
        raise kind("Target modules are not supported")

    monkeypatch.setattr("trainer.challenger.fine_tune", no_such_base)
    world.seal()
    world.finish()
    [run] = world.said()[0]
    assert (run.state, run.digest) == ("failed", None)
    assert run.reason.startswith(f"{kind.__name__}: ") and "Target modules are not supported" in run.reason
    assert any(record.exc_info for record in caplog.records), "where it was is in the log"
    monkeypatch.undo()
    world.seal()
    world.finish()
    assert states(world)[-1] == (2, "trained")


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        ("select", KeyError("text"), "desk cannot go on: 'text'"),
        ("make_challenger", StoreUnavailable("the disk is full"), "desk waits: the disk is full"),
    ],
    ids=["nobody foresaw", "too small a disk"],
)
def test_what_goes_wrong_in_one_stream_holds_up_no_other(
    step: str,
    error: Exception,
    said: str,
    world: World,
    keep_training: Keep,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other, whole = another_stream(world), getattr(cycle, step)

    def broken(*_: object) -> None:
        raise error

    world.seal()
    monkeypatch.setattr(cycle, step, broken)
    seen: list[list[tuple[int, str]]] = []

    def mend() -> None:
        seen.append(states(world))
        monkeypatch.setattr(cycle, step, whole)

    keep_training(mend, streams=(STREAM, other))
    assert seen == [[]]
    assert [g.model for g in world.said()[2]] == ["desk@0", "other@0"]
    [record] = [record for record in caplog.records if said in record.getMessage()]
    assert bool(record.exc_info) == isinstance(error, KeyError), "where it was is in the log, if nobody foresaw it"
    assert states(world) == [(1, "trained")], "tried again"


@pytest.mark.parametrize("error", [StoreUnavailable, KeyError])
def test_an_error_of_one_process_of_several_ends_it_since_the_others_are_in_the_middle_of_the_training(
    error: type[Exception], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise error("of this one")

    world.seal()
    monkeypatch.setattr(cycle, "make_challenger", broken)
    monkeypatch.setattr(cycle, "Ranks", lambda: SimpleNamespace(world=2, rank=0))
    with pytest.raises(SystemExit) as ended:
        loop.keep_training(world.config, world.contracts, (STREAM,), once=True)
    assert ended.value.code == 1
    assert states(world) == []


@pytest.mark.parametrize("to", ["teach", "judge"])
def test_a_window_whose_rows_are_all_in_quarantine_teaches_and_judges_nothing(world: World, to: str) -> None:
    """It has rows by its own count, so it is not passed over."""
    if to == "judge":
        world.seal()
        world.finish()
    before = states(world)
    first = 60 * len(before)
    entry = {
        "stream": STREAM,
        "window": len(before) + 1,
        "rule": "r",
        "detail": "",
        "at": START,
        "state": "quarantined",
    }
    with open_lake_for_writing(world.config) as lake:
        rows = [entry | {"prediction_id": f"p-{first + n}", "offset": n} for n in range(60)]
        lake.append({"quarantine": pa.Table.from_pylist(rows, TABLES["quarantine"])})
    world.seal()
    world.finish()
    assert [g.version for g in world.said()[2]] == [0]
    if to == "teach":
        assert states(world) == [(1, "failed")]
    else:
        assert states(world)[:1] == before and "promoted" not in [state for _, state in states(world)]
    world.seal()
    world.finish()
    assert states(world)[-1][1] in ("trained", "promoted")


def test_a_text_of_a_hundred_megabytes_is_a_row_like_another(world: World) -> None:
    text = "where is my card? " * (100_000_000 // 18)
    world.rows = [(text if n in (7, 67) else short, label) for n, (short, label) in enumerate(world.rows)]
    for _ in range(2):
        world.seal()
        world.finish()
    runs, evaluations, _ = world.said()
    assert (runs[0].state, runs[0].rows_new) == ("trained", 60)
    assert {e.rows for e in evaluations} == {60}
    assert runs[1].state == "promoted", runs[1].reason


def test_a_clock_that_goes_back_changes_nothing_but_the_times_that_are_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backward(datetime):
        ahead = timedelta(days=400)

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            cls.ahead -= timedelta(days=30)
            return datetime.now(tz) + cls.ahead

    path = Path(world.config.contracts) / "desk.yaml"
    path.write_text(path.read_text().replace("epochs: 1,", "epochs: 1, triggers: {cooldown: 12h, runs_per_day: 1},"))
    world.contracts = load_contracts(Path(world.config.contracts))
    monkeypatch.setattr(cycle, "datetime", Backward)
    for _ in range(2):
        world.seal()
        world.finish()
    runs, _, generations = world.said()
    times = [run.at for run in runs]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)
    assert [(run.version, run.state) for run in runs] == [(1, "trained"), (1, "promoted"), (2, "trained")]
    assert [g.version for g in generations] == [0, 1]
    assert world.trainer().next_step(STREAM) is False, "read anew it is the same: a challenger waits"


@pytest.mark.slow
def test_a_training_that_is_cancelled_leaves_nothing_and_the_next_start_takes_it_up(world: World) -> None:
    path = Path(world.config.contracts) / "desk.yaml"
    path.write_text(path.read_text().replace("epochs: 1,", "epochs: 400, checkpoint_steps: 1,"))
    world.seal()
    environment = {**os.environ, **world.config.environment(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", "--once", "--stream", STREAM]
    checkpoints = world.config.state_dir / "checkpoints"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(checkpoints.rglob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0, "it was asked to"
    runs, evaluations, generations = world.said()
    assert (runs, evaluations, [g.version for g in generations]) == ([], [], [0])
    assert [read_manifest(folder).model for folder in world.config.model_store.iterdir()] == ["desk@0"]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert "goes on from a checkpoint" in again.stderr
    assert states(world) == [(1, "trained")]


@pytest.fixture
def tiny_disk(world: World) -> Iterator[Callable[[str], int]]:
    """The model store on a disk of its own, whose size can be set. It needs the right to mount."""
    store = world.config.model_store
    store.mkdir(parents=True, exist_ok=True)

    def size(options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(store)]
        return subprocess.run(command, check=False, capture_output=True).returncode

    if size("size=1100k") != 0:
        pytest.skip("tmpfs cannot be mounted here")
    yield lambda kib: size(f"remount,size={kib}")
    subprocess.run(["umount", "--lazy", str(store)], check=True)


def test_a_full_disk_is_waited_out_loudly(
    world: World, keep_training: Keep, tiny_disk: Callable[[str], int], caplog: pytest.LogCaptureFixture
) -> None:
    """Generation 0 fits, the challenger does not: the tokenizer alone is 700 KB."""
    world.finish()
    world.seal()
    seen: list[list[tuple[int, str]]] = []
    keep_training(lambda: seen.append(states(world)), lambda: tiny_disk("64m"))
    assert seen == [[]]
    assert any("cannot be written: No space left on device" in record.getMessage() for record in caplog.records)
    assert states(world) == [(1, "trained")]
    store = world.config.model_store
    assert {read_manifest(folder).model for folder in store.iterdir()} == {"desk@0", "desk@1"}, "no draft is left"


def test_enospc_raised_in_place_of_the_write_of_a_bundles_file_is_waited_out_loudly(
    world: World, keep_training: Keep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no disk can be mounted: the system's refusal is put in the way of every byte that is written to a draft."""
    world.finish()
    world.seal()
    write = Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:
        if ".draft-" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    seen: list[list[tuple[int, str]]] = []

    def free() -> None:
        seen.append(states(world))
        monkeypatch.setattr(Path, "write_bytes", write)

    keep_training(free)
    assert seen == [[]]
    assert any("cannot be written: No space left on device" in record.getMessage() for record in caplog.records)
    assert states(world) == [(1, "trained")]


def test_an_error_in_a_draft_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), drafted(tmp_path / "store"):
        raise ZeroDivisionError
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be written"), drafted(tmp_path / "file" / "store"):
        pass
