"""`accrual quarantine`: rows that break a rule of their contract, and what people decide about them.

The sink is the lake's writer, and puts rows there when it checks a window. A decision is a record of the training topic
that the sink writes to the lake like all else: it can be made while the sink runs, and is never overwritten.
"""

from __future__ import annotations

import getpass
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer

from accrual.commands.rows import Format, print_rows, printable
from accrual.config import Config, load_config
from accrual.errors import BrokerUnavailable, NotFound, NotHere
from accrual.events import encode
from accrual.kafka import TopicNames, check_topics, producer
from accrual.ledger import Decision

if TYPE_CHECKING:
    from accrual.lake import Lake

app = typer.Typer(
    help="Quarantine: rows that break a rule of their contract, and are not trained on until they are released.",
    epilog="docs/quality.md has the rules.",
    no_args_is_help=True,
)

_COLUMNS = ["stream", "window", "prediction_id", "rule", "state", "detail", "by", "at", "note"]
_CHOSEN = """
from quarantined
where ($1::varchar is null or stream = $1) and ($2::varchar is null or rule = $2) and ($3::int is null or "window" = $3)
    and ($4::varchar is null or state = $4)
    and (len($5::varchar[]) = 0 or prediction_id in (select unnest($5::varchar[])))
order by stream, "window", prediction_id, rule
"""
_DELIVERY_S = 30.0

_Stream = Annotated[str | None, typer.Option("--stream", help="Only this stream.")]
_Rule = Annotated[str | None, typer.Option("--rule", help="Only rows that break this rule.")]
_Window = Annotated[int | None, typer.Option("--window", min=1, help="Only rows of this window.")]
_Ids = Annotated[list[str] | None, typer.Argument(help="Ids of predictions.", show_default=False)]
_Note = Annotated[str, typer.Option("--note", help="Why: kept with the decision.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be decided, and decide nothing.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@app.command(
    "list",
    epilog="Examples:  accrual quarantine list --stream credit-risk --state quarantined"
    "   |   accrual quarantine list --rule no_personal_data --format json",
)
def list_(
    stream: _Stream = None,
    rule: _Rule = None,
    window: _Window = None,
    state: Annotated[str | None, typer.Option(help="Only: quarantined, released or rejected.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    form: Annotated[Format, typer.Option("--format", help="How to print them.")] = Format.TABLE,
) -> None:
    """List rows with the rule that they break and what was decided, as of the lake's last commit."""
    found = _choose(load_config(), stream, rule, window, state, [])
    if found or form is not Format.TABLE:
        print_rows(form, _COLUMNS, ({name: row[name] for name in _COLUMNS} for row in found[:limit]))
    states = Counter(row["state"] for row in found)
    said = f"{_entries(len(found))}{''.join(f', {n} {name}' for name, n in states.most_common())}."
    if len(found) > limit:
        said += f" Not shown: {len(found) - limit} (--limit)."
    typer.echo(said, err=form is not Format.TABLE)


@app.command(epilog="Example:  accrual quarantine show 0198c5e2-6f0a-7c3e-9d2b-6c1f6a0e4b11")
def show(prediction_id: Annotated[str, typer.Argument(help="Id of a prediction.", show_default=False)]) -> None:
    """Show one prediction: the row as it is now, the rules it breaks, and every decision about it."""
    with _open(load_config()) as lake:
        entries = lake.rows('from quarantine where prediction_id = ? order by rule, "offset"', [prediction_id])
        rows = lake.rows(
            'select stream, model, predicted_at, inputs, output, label, "values" from ground_truth'
            " where prediction_id = ? and stream in (select stream from quarantine where prediction_id = ?)",
            [prediction_id, prediction_id],
        )
    if not entries:
        raise NotFound(
            f"prediction {prediction_id} is not in quarantine; `accrual quarantine list` shows those that are"
        )
    for row in rows:
        for name, value in row.items():
            typer.echo(f"{name + ':':15}{'-' if value is None else printable(str(value))}")
    for entry in entries:
        typer.echo(
            f"{entry['at']:%Y-%m-%d %H:%M:%S}  {entry['rule']}: {entry['state']} by {printable(entry['by'])}"
            f"  {printable(entry['note'] or entry['detail'])}"
        )


@app.command(
    epilog="Examples:  accrual quarantine release --stream credit-risk --rule terms_known --window 3 --dry-run"
    "   |   accrual quarantine release ID --note 'asked the customer' --yes"
)
def release(
    ids: _Ids = None,
    stream: _Stream = None,
    rule: _Rule = None,
    window: _Window = None,
    note: _Note = "",
    dry_run: _DryRun = False,
    yes: _Yes = False,
) -> None:
    """Let rows be trained on, although they break a rule: of windows that are sealed from then on."""
    _decide("released", ids, stream, rule, window, note, dry_run, yes)


@app.command(
    epilog="Examples:  accrual quarantine reject --stream support-intents --rule no_personal_data --dry-run"
    "   |   accrual quarantine reject ID --note 'a test account' --yes"
)
def reject(
    ids: _Ids = None,
    stream: _Stream = None,
    rule: _Rule = None,
    window: _Window = None,
    note: _Note = "",
    dry_run: _DryRun = False,
    yes: _Yes = False,
) -> None:
    """Keep rows out of training for good. They stay in the ground truth, and can still be released."""
    _decide("rejected", ids, stream, rule, window, note, dry_run, yes)


def _decide(
    state: Literal["released", "rejected"],
    ids: list[str] | None,
    stream: str | None,
    rule: str | None,
    window: int | None,
    note: str,
    dry_run: bool,
    yes: bool,
) -> None:
    if not (ids or stream or rule or window):
        raise typer.BadParameter("say which: ids of predictions, or a filter such as --rule no_personal_data")
    config = load_config()
    chosen = [row for row in _choose(config, stream, rule, window, None, ids or []) if row["state"] != state]
    if not chosen:
        raise NotFound(f"no row that is not {state} yet fits; `accrual quarantine list` takes the same filters")
    rules = Counter((row["stream"], row["rule"]) for row in chosen)
    for (of, name), count in rules.items():
        typer.echo(f"{of}: {_entries(count)} of {name}")
    if dry_run:
        typer.echo(f"{_entries(len(chosen))} would be {state}. This was a dry run: nothing is decided.")
        return
    if not yes:
        typer.confirm(f"{_entries(len(chosen))} will be {state}. Go on?", abort=True)
    said = {"state": state, "by": getpass.getuser(), "note": note, "at": datetime.now(UTC)}
    names = [name for name in Decision.__struct_fields__ if name != "v"]
    _say(config, msgspec.convert([{name: (row | said)[name] for name in names} for row in chosen], list[Decision]))
    typer.echo(f"{_entries(len(chosen))} {state}; the lake shows it with the sink's next commit.")


def _say(config: Config, decisions: list[Decision]) -> None:
    check_topics(config)
    topic, target = TopicNames(config.topics.prefix).training, producer(config)
    failed: list[str] = []
    for decision in decisions:
        target.produce(
            topic,
            encode(decision),
            decision.stream.encode(),
            on_delivery=lambda error, _: failed.append(error.str()) if error else None,
        )
        target.poll(0)
    if left := target.flush(_DELIVERY_S):
        failed.append(f"{left} were not delivered within {_DELIVERY_S:.0f} s")
    if failed:
        raise BrokerUnavailable(f"{len(failed)} decisions were not taken by the broker: {failed[0]}; decide again")


def _choose(
    config: Config, stream: str | None, rule: str | None, window: int | None, state: str | None, ids: list[str]
) -> list[dict[str, Any]]:
    with _open(config) as lake:
        return lake.rows(_CHOSEN, [stream, rule, window, state, ids])


def _open(config: Config) -> Lake:
    try:
        from accrual.lake import open_lake
    except ModuleNotFoundError as exc:
        raise NotHere(f"the quarantine needs DuckDB, and {exc.name} is missing: pip install 'accrual[lake]'") from exc
    return open_lake(config)


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"
