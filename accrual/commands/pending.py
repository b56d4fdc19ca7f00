"""`accrual pending`: predictions that still wait for their label."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from accrual.commands.rows import Format, print_rows
from accrual.config import load_config
from accrual.contract import Contract, load_contracts, parse_duration
from accrual.errors import ConfigError, NotHere
from accrual.kafka import TopicNames

_COLUMNS = ["stream", "prediction_id", "model", "predicted_at", "age", "deadline"]
# Age is event time: a stream is as far as its latest event. A prediction that was refused waits for nothing; of
# predictions that share an id, the first counts.
_PENDING = """
with reached as (
    select stream, max(moment) as moment from (
        select stream, max(predicted_at) as moment from predictions group by all
        union all select stream, max(observed_at) from outcomes group by all
    ) group by all
),
waiting as (
    select p.stream, prediction_id, model, predicted_at
    from predictions p
    anti join ground_truth_history g using (stream, prediction_id)
    anti join dead_letters l on l.topic = $1 and l."partition" = p."partition" and l."offset" = p."offset"
    where $2::varchar is null or p.stream = $2
    qualify row_number() over (partition by p.stream, prediction_id order by p.arrived_at, p."offset") = 1
)
select stream, prediction_id, model, predicted_at, epoch_us(moment) - epoch_us(predicted_at) as age,
    count(*) over () as total
from waiting join reached using (stream)
where age >= $3
order by predicted_at, stream, prediction_id
limit $4
"""


def _age(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def pending(
    stream: Annotated[str | None, typer.Option(help="Only this stream.")] = None,
    older_than: Annotated[
        timedelta | None,
        typer.Option(parser=_age, metavar="DURATION", help="Only those at least so old: 12h, 30d, 1y."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many: the oldest.")] = 50,
    form: Annotated[Format, typer.Option("--format", help="How to print them.")] = Format.TABLE,
) -> None:
    """List predictions that have neither a label nor expired, oldest first: the lake's state, as of its last commit.

    Age is event time: how far the latest event of the stream is ahead of the prediction. At the deadline the prediction
    expires, once event time has passed it.
    """
    try:
        from accrual.lake import open_lake
    except ModuleNotFoundError as exc:
        raise NotHere(
            f"`accrual pending` needs DuckDB, and {exc.name} is missing: pip install 'accrual[lake]'"
        ) from exc
    config = load_config()
    contracts = load_contracts(Path(config.contracts))
    if stream is not None and stream not in contracts:
        raise ConfigError(f"no contract for stream '{stream}'; there are {', '.join(contracts)}")
    age = (older_than or timedelta()) // timedelta(microseconds=1)
    asked = [TopicNames(config.topics.prefix).predictions, stream, age, limit]
    with open_lake(config) as lake:
        found = lake.rows(_PENDING, asked)
    rows = [_row(prediction, contracts) for prediction in found]
    if rows or form is not Format.TABLE:
        print_rows(form, _COLUMNS, rows)
    total = found[0]["total"] if found else 0
    said = f"{total} {'prediction waits' if total == 1 else 'predictions wait'} for a label"
    said += f"; the oldest is {rows[0]['age']} old." if rows else "."
    if total > len(rows):
        said += f" Not shown: {total - len(rows)} younger (--limit)."
    typer.echo(said, err=form is not Format.TABLE)


def _row(found: dict[str, Any], contracts: Mapping[str, Contract]) -> dict[str, Any]:
    """`deadline` is empty for a stream that has no contract any more."""
    contract = contracts.get(found["stream"])
    values = {
        "age": timedelta(microseconds=found["age"]),
        "deadline": found["predicted_at"] + timedelta(microseconds=contract.horizon_us) if contract else None,
    }
    return {column: values.get(column, found.get(column)) for column in _COLUMNS}
