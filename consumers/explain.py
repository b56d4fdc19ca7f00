"""Explain: one prediction's life, from the records it came in to the models that learned from it."""

from __future__ import annotations

from datetime import datetime

import msgspec

from accrual.errors import NotFound
from accrual.kafka import TopicNames
from accrual.lake import Lake

# What happened, in the order of the broker's clock. Outcomes of an entity are those that name the prediction's.
_EVENTS = """
with predicted as (from predictions where prediction_id = $id and ($stream::varchar is null or stream = $stream)),
named as (select distinct stream, entity from predicted where entity is not null),
outcomes_of as (
    from outcomes where prediction_id = $id and ($stream::varchar is null or stream = $stream)
    union all by name
    from outcomes o semi join named using (stream, entity)
),
events as (
    select stream, arrived_at as "at", 'prediction' as what, $predictions as topic, "partition", "offset",
        predicted_at as event_time, format('{} said {} of {}', model, output, inputs) as detail
    from predicted
    union all
    select stream, arrived_at, 'outcome', $outcomes, "partition", "offset", observed_at,
        concat("values", ' from ' || source)
    from outcomes_of
    union all
    select stream, arrived_at, 'ground truth', $ground_truth, "partition", "offset",
        coalesce(observed_at, predicted_at),
        format('{}, revision {}: label {}', status, revision, coalesce(label, 'none'))
    from ground_truth_history where prediction_id = $id and ($stream::varchar is null or stream = $stream)
    union all
    select coalesce(stream, ''), arrived_at, 'dead letter', topic, "partition", "offset", null,
        format('{}: {}', reason, detail)
    from dead_letters where prediction_id = $id and ($stream::varchar is null or stream = $stream)
)
from events order by "at", "offset"
"""

_WINDOWS = """
select distinct w.stream, w."window", w.snapshot_id, w.sealed_at, w.digest, t.prediction_id is not null as touched
from windows w join ground_truth g
    on g.stream = w.stream and g.predicted_at >= w.from_time and g.predicted_at < w.to_time
left join touched t on t.stream = w.stream and t."window" = w."window" and t.prediction_id = g.prediction_id
where g.prediction_id = $id and ($stream::varchar is null or g.stream = $stream)
order by w.stream, w."window"
"""

_MODELS = """
select model, published_at, digest from generations
where stream = $stream and list_contains(windows, $window) order by version
"""


class Happening(msgspec.Struct, frozen=True):
    """Something that came, `at` by the broker's clock, as record `offset` of a topic's `partition`."""

    stream: str
    at: datetime
    what: str
    topic: str
    partition: int
    offset: int
    event_time: datetime | None
    detail: str


class InWindow(msgspec.Struct, frozen=True):
    """A sealed window that the prediction is a row of; `models` may have learned from it (a run samples its rows)."""

    stream: str
    window: int
    snapshot_id: int
    sealed_at: datetime
    digest: str
    touched: bool
    models: list[str] = []


class Life(msgspec.Struct, frozen=True):
    """Everything the lake knows of one prediction id."""

    prediction_id: str
    happenings: list[Happening]
    windows: list[InWindow]


def explain(lake: Lake, names: TopicNames, prediction_id: str, stream: str | None) -> Life:
    """The life of a prediction. Raises NotFound if the lake knows nothing of its id."""
    asked = {"id": prediction_id, "stream": stream}
    topics = {"predictions": names.predictions, "outcomes": names.outcomes, "ground_truth": names.ground_truth}
    happenings = lake.rows(_EVENTS, asked | topics)
    if not happenings:
        where = f"stream {stream} of the lake" if stream else "the lake"
        raise NotFound(f"{where} has nothing with prediction id '{prediction_id}'; what came lately may be on its way")
    windows = []
    for window in msgspec.convert(lake.rows(_WINDOWS, asked), list[InWindow]):
        models = lake.rows(_MODELS, {"stream": window.stream, "window": window.window})
        windows.append(msgspec.structs.replace(window, models=[model["model"] for model in models]))
    return Life(prediction_id, msgspec.convert(happenings, list[Happening]), windows)
