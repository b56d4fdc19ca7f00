"""`accrual dead-letters`: look at events that broke their contract, and send them again when the cause is gone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from accrual.commands.rows import Format, print_rows, printable
from accrual.config import Config, load_config
from accrual.dead_letters import ADVICE, Choice, Filed, read_letters, replay, replayed_since, why_not
from accrual.errors import BrokerUnavailable, NotFound
from accrual.events import REASONS
from accrual.kafka import check_topics

app = typer.Typer(
    help="Dead letters: events that broke their contract, with the reason and the original bytes.",
    epilog="docs/dead-letters.md says what each reason means and what to do about it.",
    no_args_is_help=True,
)

_COLUMNS = ["offset", "arrived_at", "reason", "stream", "prediction_id", "record", "detail"]
_NAMED = 20  # refused letters that a replay names one by one


def _reason(text: str) -> str:
    if text not in REASONS:
        raise typer.BadParameter(f"'{text}' is none; reasons are {', '.join(REASONS)}")
    return text


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise typer.BadParameter(f"'{text}' is not ISO 8601; write 2026-05-01 or 2026-05-01T12:30:00Z") from exc
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


_Reason = Annotated[str | None, typer.Option("--reason", parser=_reason, metavar="REASON", help="Only this reason.")]
_Stream = Annotated[str | None, typer.Option("--stream", help="Only this stream.")]
_Id = Annotated[str | None, typer.Option("--prediction-id", help="Only this prediction.")]
_Topic = Annotated[str | None, typer.Option("--topic", help="Only what came in this topic: predictions or outcomes.")]
_Since = Annotated[
    datetime | None,
    typer.Option("--since", parser=_moment, metavar="ISO", help="Only letters that arrived then or later (UTC)."),
]
_Until = Annotated[
    datetime | None,
    typer.Option("--until", parser=_moment, metavar="ISO", help="Only letters that arrived before then (UTC)."),
]


@app.command(
    "list",
    epilog="Examples:  accrual dead-letters list --since 2026-05-01 --reason unknown_stream"
    "   |   accrual dead-letters list --format json --limit 1000",
)
def list_(
    reason: _Reason = None,
    stream: _Stream = None,
    prediction_id: _Id = None,
    topic: _Topic = None,
    since: _Since = None,
    until: _Until = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many: the newest.")] = 50,
    replayed: Annotated[
        bool, typer.Option("--replayed", help="Say when each was replayed; reads the input topics from there on.")
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="How to print them.")] = Format.TABLE,
) -> None:
    """List dead letters, newest last, and count them by reason."""
    config = _checked_config()
    choice = Choice(reason=reason, stream=stream, prediction_id=prediction_id, topic=topic, since=since, until=until)
    newest: deque[Filed] = deque(maxlen=limit)
    reasons: Counter[str] = Counter()
    for filed in read_letters(config, choice):
        newest.append(filed)
        reasons[filed.letter.reason] += 1
    again = replayed_since(config, newest[0].arrived_at) if replayed and newest else {}
    columns = [*_COLUMNS, "replayed_at"] if replayed else _COLUMNS
    if newest or form is not Format.TABLE:
        print_rows(form, columns, (_row(filed, columns, again) for filed in newest))
    said = f"{_counted(reasons.total())}{_by_reason(reasons)}."
    if reasons.total() > len(newest):
        said += f" Not shown: {reasons.total() - len(newest)} older (--limit)."
    typer.echo(said, err=form is not Format.TABLE)


@app.command(epilog="Example:  accrual dead-letters show 12   where 12 is the offset that `list` shows")
def show(
    offset: Annotated[int, typer.Argument(min=0, help="The letter's offset.", show_default=False)],
) -> None:
    """Show everything about one dead letter: the original bytes, where they came from, and what to do."""
    for filed in read_letters(_checked_config(), Choice(offsets=frozenset({offset}))):
        letter = filed.letter
        advice = ADVICE.get(letter.reason)
        lines = {
            "letter": f"{filed.offset}, arrived at {filed.arrived_at.isoformat()}",
            "reason": f"{letter.reason}: {REASONS.get(letter.reason, 'a reason that this version does not know')}",
            "detail": letter.detail,
            "record": filed.record,
            "stream": letter.stream,
            "prediction_id": letter.prediction_id,
            "what to do": advice and advice.todo,
            "replayed": advice and advice.replayed,
            "key": _bytes(letter.key),
            "value": _bytes(letter.value),
        }
        for name, text in lines.items():
            typer.echo(f"{name + ':':15}{'-' if text is None else printable(text)}")
        return
    raise NotFound(f"there is no dead letter {offset}; `accrual dead-letters list` shows those there are")


@app.command(
    "replay",
    epilog="Examples:  accrual dead-letters replay --reason unknown_stream --stream returns --dry-run"
    "   |   accrual dead-letters replay 12 15 --yes",
)
def replay_(
    offsets: Annotated[
        list[int] | None, typer.Argument(min=0, help="Offsets of letters, as `list` shows them.", show_default=False)
    ] = None,
    reason: _Reason = None,
    stream: _Stream = None,
    prediction_id: _Id = None,
    topic: _Topic = None,
    since: _Since = None,
    until: _Until = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and write nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Write the original records of the chosen letters to their topics again, to be judged anew.

    For when the cause is gone: the contract was added, the workers were upgraded, the prediction has come. A record
    that was replayed before, or was joined in another way, is dropped as a duplicate.
    """
    choice = Choice(
        offsets=frozenset(offsets or ()),
        reason=reason,
        stream=stream,
        prediction_id=prediction_id,
        topic=topic,
        since=since,
        until=until,
    )
    if choice == Choice():
        raise typer.BadParameter("say which: offsets, or a filter such as --reason unknown_stream")
    config = _checked_config()
    chosen, fine, refusals = _plan(config, choice)
    if not chosen:
        raise NotFound("no dead letter is chosen by that; `accrual dead-letters list` takes the same filters")
    _say_plan(chosen, refusals)
    if not fine:
        raise NotFound("none of them can be replayed")
    if dry_run:
        typer.echo(f"Would write {_records(len(fine))} again. This was a dry run: nothing is written.")
        return
    if not yes:
        typer.confirm(f"Write {_records(len(fine))} again?", abort=True)
    started = datetime.now(UTC)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replaying", total=len(fine))
        failed = replay(config, read_letters(config, Choice(offsets=frozenset(fine))), lambda: progress.advance(task))
    typer.echo(f"Wrote {_records(len(fine) - len(failed))} again.")
    if failed:
        raise BrokerUnavailable(
            f"the broker refused {_records(len(failed))}: "
            + "; ".join(f"letter {offset}: {why}" for offset, why in failed.items())
        )
    since_then = started.isoformat(timespec="seconds").replace("+00:00", "Z")
    typer.echo(f"Those that fail again show up in:  accrual dead-letters list --since {since_then}")


def _checked_config() -> Config:
    config = load_config()
    check_topics(config)
    return config


def _plan(config: Config, choice: Choice) -> tuple[Counter[str], list[int], dict[int, str]]:
    """How many letters are chosen, by reason; offsets of those that can be replayed; why the others cannot."""
    chosen: Counter[str] = Counter()
    fine: list[int] = []
    refusals: dict[int, str] = {}
    for filed in read_letters(config, choice):
        chosen[filed.letter.reason] += 1
        refusal = why_not(config, filed)
        if refusal is None:
            fine.append(filed.offset)
        else:
            refusals[filed.offset] = refusal
    absent = choice.offsets - set(fine) - refusals.keys()
    if absent:
        listed = ", ".join(map(str, sorted(absent)))
        raise NotFound(f"no dead letter that fits has the offset {listed}; `accrual dead-letters list` shows them")
    return chosen, fine, refusals


def _say_plan(chosen: Mapping[str, int], refusals: Mapping[int, str]) -> None:
    for reason, count in chosen.items():
        advice = ADVICE.get(reason)
        typer.echo(f"{count} {reason}: {advice.replayed if advice else 'a reason that this version does not know'}")
    for offset, why in list(refusals.items())[:_NAMED]:
        typer.echo(f"  letter {offset} is refused: {why}")
    if len(refusals) > _NAMED:
        typer.echo(f"  and {len(refusals) - _NAMED} more")


def _row(filed: Filed, columns: Iterable[str], again: Mapping[int, datetime]) -> dict[str, Any]:
    letter = filed.letter
    values = {
        "offset": filed.offset,
        "arrived_at": filed.arrived_at,
        "reason": letter.reason,
        "stream": letter.stream,
        "prediction_id": letter.prediction_id,
        "record": filed.record,
        "detail": letter.detail,
        "replayed_at": again.get(filed.offset),
    }
    return {column: values[column] for column in columns}


def _bytes(value: bytes | None) -> str | None:
    """Text where it is text that a terminal shows as it is; else hexadecimal."""
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return f"(hexadecimal) {value.hex()}"
    return text if printable(text) == text else f"(hexadecimal) {value.hex()}"


def _counted(count: int) -> str:
    return "1 dead letter" if count == 1 else f"{count} dead letters"


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def _by_reason(reasons: Counter[str]) -> str:
    return ": " + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) if reasons else ""
