"""`accrual quarantine`: rows that broke a rule of their contract, and what people decide about them."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from accrual.commands.rows import Format, print_rows
from accrual.config import Config, load_config
from accrual.errors import BrokerUnavailable, NotFound, NotHere
from accrual.events import encode
from accrual.kafka import TopicNames, check_topics, producer
from accrual.ledger import Decision

app = typer.Typer(
    help="Quarantine: rows that broke a rule of their contract; no model learns from them until they are released.",
    epilog="docs/quality.md says what the rules are. A decision is a record of the training topic; the sink writes it"
    " to the lake's table `decisions`.",
    no_args_is_help=True,
)

_COLUMNS = ["stream", "window", "prediction_id", "rule", "state", "detail", "at"]
_FOUND = """
select {columns}, count(*) over () as total from quarantined
where ($stream::varchar is null or stream = $stream) and ($rule::varchar is null or rule = $rule)
    and ($window::integer is null or "window" = $window) and ($id::varchar is null or prediction_id = $id)
    and ($state::varchar is null or state = $state)
order by stream, "window", prediction_id, rule limit $limit
"""
_LABEL = """
select label, inputs, output, "values" from ground_truth where stream = ? and prediction_id = ?
"""

_Stream = Annotated[str | None, typer.Option(help="Only this stream.")]
_Rule = Annotated[str | None, typer.Option(help="Only what broke this rule.")]
_Window = Annotated[int | None, typer.Option(min=1, help="Only rows of this window.")]
_Id = Annotated[str | None, typer.Option("--prediction-id", help="Only this prediction.")]
_Note = Annotated[str, typer.Option(help="Why: kept with the decision.")]
_By = Annotated[str | None, typer.Option(help="Who decides.", show_default="you")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be decided.")]


@app.command("list", epilog="Examples:  accrual quarantine list --stream support-intents --rule no_personal_data")
def list_(
    stream: _Stream = None,
    rule: _Rule = None,
    window: _Window = None,
    prediction_id: _Id = None,
    state: Annotated[str | None, typer.Option(help="quarantined, released or rejected.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    form: Annotated[Format, typer.Option("--format", help="How to print them.")] = Format.TABLE,
) -> None:
    """List quarantined rows with the rule they broke and their state."""
    rows = _find(load_config(), stream, rule, window, prediction_id, state, limit)
    total = rows[0]["total"] if rows else 0
    shown = [{name: row[name] for name in _COLUMNS} for row in rows]
    if rows or form is not Format.TABLE:
        print_rows(form, _COLUMNS, shown)
    more = f" Not shown: {total - len(rows)} (--limit)." if total > len(rows) else ""
    typer.echo(f"{total} {'row' if total == 1 else 'rows'} of quarantine.{more}", err=form is not Format.TABLE)


@app.command(epilog="Example:  accrual quarantine show 0199-... --stream support-intents")
def show(
    prediction_id: Annotated[str, typer.Argument(help="The prediction's id.", show_default=False)],
    stream: _Stream = None,
) -> None:
    """Show everything about one quarantined row: the rules, the decisions, inputs and label."""
    from accrual.lake import open_lake

    config = load_config()
    rows = _find(config, stream, None, None, prediction_id, None, 100)
    if not rows:
        raise NotFound(f"no row of prediction '{prediction_id}' is quarantined; `accrual quarantine list` shows all")
    print_rows(Format.TABLE, list(rows[0])[:-1], [{k: v for k, v in row.items() if k != "total"} for row in rows])
    with open_lake(config) as lake:
        found = lake.rows(_LABEL, [rows[0]["stream"], prediction_id])
    for row in found:
        print_rows(Format.TABLE, list(row), [row])


@app.command(epilog="Example:  accrual quarantine release --stream credit-risk --rule income_range --dry-run")
def release(
    stream: _Stream = None,
    rule: _Rule = None,
    window: _Window = None,
    prediction_id: _Id = None,
    note: _Note = "",
    by: _By = None,
    dry_run: _DryRun = False,
) -> None:
    """Let models learn from the chosen rows after all, from the next cycle on."""
    _decide("released", stream, rule, window, prediction_id, note, by, dry_run)


@app.command(epilog="Example:  accrual quarantine reject --prediction-id 0199-... --note 'a test account'")
def reject(
    stream: _Stream = None,
    rule: _Rule = None,
    window: _Window = None,
    prediction_id: _Id = None,
    note: _Note = "",
    by: _By = None,
    dry_run: _DryRun = False,
) -> None:
    """Settle that no model shall learn from the chosen rows."""
    _decide("rejected", stream, rule, window, prediction_id, note, by, dry_run)


def _decide(
    state: str,
    stream: str | None,
    rule: str | None,
    window: int | None,
    prediction_id: str | None,
    note: str,
    by: str | None,
    dry_run: bool,
) -> None:
    """One decision for each row and rule that is not in that state, or a list of them."""
    if stream is None and rule is None and window is None and prediction_id is None:
        raise typer.BadParameter("choose rows: --stream, --rule, --window or --prediction-id")
    config = load_config()
    found = [
        row for row in _find(config, stream, rule, window, prediction_id, None, 1_000_000) if row["state"] != state
    ]
    if not found:
        raise NotFound(f"no such row is quarantined and not {state} yet; `accrual quarantine list` shows all")
    if dry_run:
        print_rows(Format.TABLE, _COLUMNS, [{name: row[name] for name in _COLUMNS} for row in found])
        typer.echo(f"{len(found)} would be {state}; nothing was decided.")
        return
    check_topics(config)
    client, topic = producer(config), TopicNames(config.topics.prefix).training
    for row in found:
        decision = Decision(
            stream=row["stream"],
            prediction_id=row["prediction_id"],
            rule=row["rule"],
            state="released" if state == "released" else "rejected",
            by=by or getpass.getuser(),
            note=note,
            at=datetime.now(UTC),
        )
        client.produce(topic, encode(decision), decision.stream.encode())
        client.poll(0)
    if left := client.flush(30):
        raise BrokerUnavailable(f"{left} of {len(found)} decisions did not reach the broker; decide again")
    typer.echo(f"{len(found)} {state}. The lake shows it within seconds, while a sink runs.")


def _find(
    config: Config,
    stream: str | None,
    rule: str | None,
    window: int | None,
    prediction_id: str | None,
    state: str | None,
    limit: int,
) -> list[dict[str, Any]]:
    try:
        from accrual.lake import open_lake
    except ModuleNotFoundError as exc:
        raise NotHere(
            f"`accrual quarantine` needs DuckDB, and {exc.name} is missing: pip install 'accrual[lake]'"
        ) from exc
    asked = {"stream": stream, "rule": rule, "window": window, "id": prediction_id, "state": state, "limit": limit}
    columns = 'stream, "window", prediction_id, rule, state, detail, "at", "by", note, decided_at'
    with open_lake(config) as lake:
        return lake.rows(_FOUND.format(columns=columns), asked)
