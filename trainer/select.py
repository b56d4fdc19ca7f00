"""Select: which rows a challenger learns from, what each counts, and which are kept back to calibrate it.

    fresh        the rows of the new windows, and younger ones where `training.cohort` says so; of more than
                 `training.max_rows` the newest, those that the model was least sure of, or the rarest
                 (`training.prefer`)
    calibrate    the latest rows of the new windows, kept back: as they come, whatever is preferred or balanced
    older        a sample of the rows before, so that what was learned is not lost

Rows in quarantine, rejected ones, erased ones and those that are held out are none of them. Held-out rows are what
generations can be compared on over all windows, those they learned from too (`matrix.py`). All is read at one snapshot
of the lake: a row that was revised after its window was sealed shows the label that it had by then. The choice is a
function of that snapshot, the contract and the seed; docs/training-data.md says what of it ends where.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from accrual.contract import Contract
from accrual.lake import Lake, json_path
from accrual.watermark import watermark_of
from trainer.cohort import ages_of, arrival_weights
from trainer.pool import Found, Pool
from trainer.weigh import Row, balanced, control_weight, shift_of, weight_by_label, without_duplicates

ROW_COLUMNS = pa.schema(
    [
        ("prediction_id", pa.string()),
        ("revision", pa.int32()),
        ("label", pa.string()),
        ("part", pa.string()),
        ("weight", pa.float64()),
    ]
)
"""What a bundle's rows.parquet says of each row. `part`: `new`, `replay` or `calibrate`."""

LAKE_MEMORY = "384MiB"  # the engine's; a window of ten million rows is chosen from with it
MOST_JUDGED = 500_000  # rows of a window; docs/judging.md says what that leaves undecided


class Window(msgspec.Struct, frozen=True):
    """A sealed window: predictions of `from_time` up to `to_time`, as the lake shows them at `snapshot_id`."""

    stream: str
    window: int
    snapshot_id: int
    from_time: datetime
    to_time: datetime
    coverage: float
    trainable: int = 0


class Selection(msgspec.Struct, frozen=True):
    """`learn` holds new and replayed rows, `calibrate` the latest new ones; `rows` (ROW_COLUMNS) lists all of them.

    Duplicates are in `learn` through a newer one of the same text and label; in `rows` they weigh 0. `shift`: what
    is to be added to the logit of a label (`prior_shift`). `until`: all rows are of predictions before that. `counts`:
    what was chosen, and what was not and why.
    """

    learn: list[Row]
    calibrate: list[Row]
    rows: pa.Table
    shift: dict[str, float]
    until: datetime
    counts: dict[str, int]

    @property
    def new(self) -> int:
        """How many rows of the new windows there are, those kept back included."""
        return self.counts["new"] + self.counts["calibrate"]

    @property
    def replayed(self) -> int:
        """How many older rows there are."""
        return self.counts["replay"]

    @property
    def digest(self) -> str:
        """SHA-256 over what `rows` says of each row, in order."""
        columns = (self.rows[name].to_pylist() for name in ROW_COLUMNS.names)
        lines = "\n".join("|".join(map(str, row)) for row in zip(*columns, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()


# A label that came no later than the horizon took so long; one that expired took the horizon. A row of an erased
# prediction may come again from the join, which still had it: nothing of it is among the predictions then.
_LABELED = """
with held as (select distinct prediction_id from quarantined where stream = $stream and state <> 'released'),
labeled as not materialized (
    select prediction_id, revision, label, inputs, predicted_at,
        case when observed_at is null then $horizon_us
            else least(greatest(epoch_us(observed_at - predicted_at), 0), $horizon_us) end as delay_us,
        list_reverse_sort((output->'$.probabilities.*')::double[]) as said,
        coalesce(said[1] - coalesce(said[2], 0), 1) as margin, 0.0 as of_label, 0 as of_slice,
        case when prediction_id in (select prediction_id from held) then 'quarantined'
            when prediction_id in (select prediction_id from erased_ids) then 'erased'
            when {held_out} then 'held_out' end as excluded
    from ground_truth where stream = $stream and label is not null and {when}
)
"""
# Found before the rows are read: both at once, of a million rows, are more than the engine's memory holds.
_ERASED = """
select distinct prediction_id from ground_truth_history where stream = $stream and {when}
    and prediction_id not in (select prediction_id from predictions where stream = $stream and {when})
"""
_IN_WINDOWS = "predicted_at >= $since and predicted_at < $until"
_IN_WINDOWS_OR_COME = """predicted_at >= $since and predicted_at <= greatest($until, $reached)
    and (predicted_at < $until or predicted_at + to_microseconds(delay_us) <= $reached)"""
# A digest of the id chooses, so the choice is the same in every run, whatever the lake holds.
_JUDGED = "left(md5(prediction_id || ':judged'), 8) < $judged"
_HELD_OUT = "left(md5(prediction_id || ':held out'), 8) < $held_out"
# An order that only id and seed decide: a sample that any engine draws again.
_BY_CHANCE = "md5(prediction_id || $salt), prediction_id"


def sealed_windows(lake: Lake, stream: str) -> list[Window]:
    """The sealed windows of a stream that hold a row to learn from, in order."""
    found = lake.rows(
        'select stream, "window", snapshot_id, from_time, to_time, coverage, trainable from windows'
        ' where stream = ? and trainable > 0 order by "window"',
        [stream],
    )
    return msgspec.convert(found, list[Window])


def rows_of(
    lake: Lake, contract: Contract, window: Window, most: int = MOST_JUDGED, read_by: Contract | None = None
) -> Iterator[Row]:
    """The labeled rows of a window, oldest first, read as they are asked for. `lake` is pinned to its snapshot.

    Of a window with more than `most` about so many: those that a digest of the id chooses, the same every time.
    `read_by`: the contract of the model that is to read them, if that is another version: its template makes the texts.
    """
    return _in_order(lake, contract, window, (None, "held_out"), most, read_by)


def held_out_rows(lake: Lake, contract: Contract, window: Window, read_by: Contract | None = None) -> Iterator[Row]:
    """Those of `rows_of` that no generation learns from."""
    return _in_order(lake, contract, window, ("held_out",), MOST_JUDGED, read_by)


def select(lake: Lake, contract: Contract, new: Sequence[Window], seed: int) -> Selection:
    """Choose from the new windows and, `training.replay` times as many, rows before them.

    `lake` is pinned to the last new window's snapshot.
    """
    training, until = contract.training, new[-1].to_time
    reached = None if training.cohort == "mature" else watermark_of(lake, contract)
    pool = Pool(contract, until, seed)
    for found in _fresh(lake, contract, new, reached):
        pool.add(found)
    fresh, calibrate = pool.chosen()
    size = len(fresh) + len(calibrate)
    if training.cohort == "ipw" and reached is not None:
        apart = calibrate[0].at if calibrate else until
        ages = ages_of(lake, contract, max(reached, until), new[0].from_time, apart, until)
        fresh = _weighted(fresh, arrival_weights(np.array([found.delay_us for found in fresh], dtype=np.int64), ages))
    chosen = {found.row.prediction_id for found in (*fresh, *calibrate)}
    older, drawn = _older(lake, contract, until, chosen, int(size * training.replay), seed)
    replayed = {found.row.prediction_id for found in older}

    in_order = [found.row for found in sorted([*older, *fresh], key=lambda found: (found.at, found.row.prediction_id))]
    kept, merged = without_duplicates(in_order)
    natural = weight_by_label([found.row for found in fresh])
    for label, weight in _natural_of(contract, older, drawn).items():
        natural[label] = natural.get(label, 0.0) + weight
    learn = balanced(kept, training.balance)
    parts = [(row, "replay" if row.prediction_id in replayed else "new") for row in (*learn, *merged)]
    parts += [(found.row, "calibrate") for found in calibrate]
    by_part = Counter(part for row, part in parts if row.weight > 0)
    return Selection(
        learn=learn,
        calibrate=[found.row for found in calibrate],
        rows=_table(parts),
        shift=shift_of(contract, natural, learn),
        until=max([until, *(found.at + timedelta(microseconds=1) for found in fresh)]),
        counts={"new": 0, "replay": 0, "calibrate": 0, "merged": len(merged), **pool.excluded, **by_part},
    )


def _in_order(
    lake: Lake,
    contract: Contract,
    window: Window,
    wanted: Collection[str | None],
    most: int,
    read_by: Contract | None,
) -> Iterator[Row]:
    """The rows of a window that are excluded for one of these reasons, None being none; oldest first."""
    span: dict[str, Any] = {"since": window.from_time, "until": window.to_time}
    drawn = "true"
    if window.trainable > most:
        drawn, span["judged"] = _JUDGED, _digits_below(most / window.trainable)
    ask = f"select * exclude (said) from labeled where {drawn} order by predicted_at, prediction_id"
    rows = _found(lake, contract, ask, _IN_WINDOWS, span, read_by)
    return (found.row for found in rows if found.excluded in wanted)


def _fresh(lake: Lake, contract: Contract, windows: Sequence[Window], reached: datetime | None) -> Iterator[Found]:
    """The labeled rows of the windows and, if event time that was `reached` is given, younger ones; in any order."""
    span: dict[str, Any] = {"since": windows[0].from_time, "until": windows[-1].to_time}
    when, which = _IN_WINDOWS, "true"
    if reached is not None:
        span["reached"] = reached
        when, which = "predicted_at >= $since and predicted_at <= greatest($until, $reached)", _IN_WINDOWS_OR_COME
    of_slice = "of_slice"
    if contract.training.prefer == "rare":
        own, paths = _slice_of(contract)
        span |= paths
        of_slice = f"count(*) filter (excluded is null) over (partition by {own})"
    ask = f"select * exclude (said) replace ({of_slice} as of_slice) from labeled where {which}"
    return _found(lake, contract, ask, when, span)


def _older(
    lake: Lake, contract: Contract, until: datetime, without: set[str], wanted: int, seed: int
) -> tuple[list[Found], Mapping[str, int]]:
    """A sample of `wanted` rows before `until` that are not in `without`: at random, or evenly over strata.

    And how many of each label were drawn for it, with those that are left out, which only the contract can tell.
    """
    by = contract.training.replay_by
    stratum, paths = _slice_of(contract) if by == "slice" else (by, {})
    strata = "" if by == "random" else f"row_number() over (partition by {stratum} order by {_BY_CHANCE}),"
    # Where exposed rows are left out, the sample goes on until it is full.
    limit = "" if _leaves_out_exposed(contract) else f"limit {wanted}"
    of_label = "count(*) over (partition by label) / count(*) over ()" if by == "label" else "of_label"
    ask = f"""
        select * exclude (said) replace ({of_label} as of_label) from labeled
        where excluded is null and prediction_id not in (select prediction_id from chosen)
        order by {strata} {_BY_CHANCE} {limit}
    """
    chosen = pa.table({"prediction_id": pa.array(sorted(without), pa.string())})
    with lake.with_tables({"chosen": chosen}):
        found = _found(lake, contract, ask, "predicted_at < $until", {"until": until, "salt": f":{seed}", **paths})
        sample: list[Found] = []
        drawn: Counter[str] = Counter()
        while len(sample) < wanted and (one := next(found, None)) is not None:
            drawn[one.row.label] += 1
            if not one.excluded:
                sample.append(one)
        return sample, drawn


def _leaves_out_exposed(contract: Contract) -> bool:
    return contract.training.control is not None and contract.training.control.weight == 0


def _natural_of(contract: Contract, older: Sequence[Found], drawn: Mapping[str, int]) -> Mapping[str, float]:
    """What each label would weigh among the older rows if these had been drawn at random, as many of them.

    Drawn evenly over labels, a row stands for as many of its label as there are of it for one that was drawn.
    """
    weights = weight_by_label([found.row for found in older])
    if contract.training.replay_by != "label":
        return weights
    stands_for = {found.row.label: found.of_label / drawn[found.row.label] for found in older}
    size = len(older) / sum(stands_for[found.row.label] for found in older) if older else 0.0
    return {label: weight * stands_for[label] * size for label, weight in weights.items()}


def _found(
    lake: Lake, contract: Contract, ask: str, when: str, span: Mapping[str, Any], read_by: Contract | None = None
) -> Iterator[Found]:
    labeled = _LABELED.format(when=when, held_out=_HELD_OUT)
    held_out = _digits_below(contract.training.held_out)
    asked = {"stream": contract.stream, "horizon_us": contract.horizon_us, "held_out": held_out, **span}
    with lake.with_tables({"erased_ids": _erased_ids(lake, contract, when, span)}):
        for batch in lake.batches(labeled + ask, asked):
            yield from (_read(contract, found, read_by) for found in batch.to_pylist())


def _erased_ids(lake: Lake, contract: Contract, when: str, span: Mapping[str, Any]) -> pa.Table:
    """The ids of labeled rows whose prediction was erased."""
    found: list[str] = []
    if lake.rows("select 1 from erasures where stream = ? limit 1", [contract.stream]):
        asked = {name: value for name, value in span.items() if f"${name}" in when}
        query = _ERASED.format(when=when)
        found = [row["prediction_id"] for row in lake.rows(query, {"stream": contract.stream, **asked})]
    return pa.table({"prediction_id": pa.array(found, pa.string())})


def _read(contract: Contract, found: Mapping[str, Any], read_by: Contract | None) -> Found:
    raw = found["inputs"].encode()
    inputs = contract.decode_inputs(raw)
    weight = control_weight(contract.training.control, inputs)
    text = contract.render(inputs) if read_by is None else read_by.render_recorded(raw)
    row = Row(found["prediction_id"], text, found["label"], found["revision"], weight, contract.slices_of(inputs))
    excluded = found["excluded"]
    if excluded in (None, "held_out"):  # what is held out judges, so it must be a row that counts
        outside = not contract.output.accepts(row.label)
        excluded = "outside" if outside else "exposed" if weight == 0 else excluded
    return Found(
        row,
        found["predicted_at"],
        found["delay_us"],
        found["margin"],
        excluded,
        of_label=found["of_label"],
        of_slice=found["of_slice"],
    )


def _digits_below(share: float) -> str:
    """Of `share` of all ids the first eight digits of the digest are below it."""
    return f"{round(share * 0x1_0000_0000):08x}"


def _weighted(rows: Sequence[Found], weights: np.ndarray[Any, np.dtype[np.float64]]) -> list[Found]:
    return [
        msgspec.structs.replace(found, row=msgspec.structs.replace(found.row, weight=found.row.weight * float(weight)))
        for found, weight in zip(rows, weights, strict=True)
    ]


def _slice_of(contract: Contract) -> tuple[str, dict[str, str]]:
    """SQL for the values of the inputs in `quality.slices`, null where one is missing, and its parameters."""
    paths: dict[str, str] = {}
    values = []
    for own in contract.quality.slices if contract.quality is not None else []:
        found = []
        for name in (own, *contract.inputs[own].names_before):
            found.append(f"json_extract_string(inputs, $path_{len(paths)})")
            paths[f"path_{len(paths)}"] = json_path(name)
        values.append(f"coalesce({', '.join(found)})")
    return f"to_json([{', '.join(values)}])", paths


def _table(parts: Sequence[tuple[Row, str]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "prediction_id": row.prediction_id,
                "revision": row.revision,
                "label": row.label,
                "part": part,
                "weight": row.weight,
            }
            for row, part in parts
        ],
        ROW_COLUMNS,
    )
