"""Recall: sealed windows of which something changed or was erased since, and the generations that learned from them."""

from __future__ import annotations

from datetime import datetime

import msgspec

from accrual.lake import Lake

_TOUCHED = """
with touches as (
    select stream, "window", prediction_id as prediction, sealed_label is distinct from label as changed,
        false as erased, touched_at
    from touched
    union all
    select distinct stream, "window", prediction, false, true, "at" from erasures where "window" is not null
),
windows_touched as (
    select stream, "window", count(*) filter (not erased) as predictions, count(*) filter (changed) as labels_changed,
        count(distinct prediction) filter (erased) as erased,
        min(touched_at) as first_at, max(touched_at) as last_at
    from touches where $stream::varchar is null or stream = $stream group by stream, "window"
),
taught as (
    select t.stream, t."window", list(g.model order by g.version) as generations
    from windows_touched t join generations g on g.stream = t.stream and list_contains(g.windows, t."window")
    group by all
)
select w.* , coalesce(generations, []) as generations
from windows_touched w left join taught using (stream, "window") order by stream, "window"
"""


class TouchedWindow(msgspec.Struct, frozen=True):
    """A sealed window of which `predictions` have later ground truth; for `labels_changed` of them another label.

    `erased`: predictions of it that `accrual erase` removed. `first_at` and `last_at` say when that came. `generations`
    are the models that were trained on the window.
    """

    stream: str
    window: int
    predictions: int
    labels_changed: int
    erased: int
    first_at: datetime
    last_at: datetime
    generations: list[str]


def touched_windows(lake: Lake, stream: str | None = None) -> list[TouchedWindow]:
    """The touched windows of a stream, or of all."""
    return msgspec.convert(lake.rows(_TOUCHED, {"stream": stream}), list[TouchedWindow])
