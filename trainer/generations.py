"""Generations: the ledger as the lake tells it. Every run with how it ended, and every model with how it was judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from accrual.config import Config
from accrual.errors import NotFound
from accrual.lake import Lake
from accrual.ledger import Evaluation, Generation, Run

if TYPE_CHECKING:
    from accrual.predictor import Predictor

# Of a processor nobody knows better: Lannelongue, Grealey and Inouye 2021, "Green Algorithms", Adv. Sci. 8(12).
WATTS = 12.0
_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_NESTED = ("intervals", "reliability", "slices")  # JSON text in the lake
_OF = "($stream::varchar is null or stream = $stream)"


class Trial(msgspec.Struct, frozen=True):
    """A challenger judged on a window, beside the champion of the time and generation 0, all on the same rows."""

    challenger: Evaluation
    champion: Evaluation
    generation_0: Evaluation

    @property
    def all(self) -> tuple[Evaluation, Evaluation, Evaluation]:
        """The three, the challenger first."""
        return self.challenger, self.champion, self.generation_0

    @property
    def gain(self) -> float:
        """By how much its Brier score was below the champion's, a row."""
        return self.champion.brier - self.challenger.brier


class Candidate(msgspec.Struct, frozen=True):
    """A model that was trained or tried: its run as it ended, its trials in the order of windows, its publication.

    `run` is None for generation 0, `published` for a model that never was.
    """

    stream: str
    version: int
    run: Run | None
    trials: list[Trial]
    published: Generation | None

    @property
    def model(self) -> str:
        """`stream@version`."""
        return f"{self.stream}@{self.version}"

    @property
    def state(self) -> str:
        """How it ended: promoted, rejected, failed; or trained and waiting."""
        return self.run.state if self.run else "promoted"

    @property
    def bundle(self) -> str | None:
        """Its folder in the model store, if it came so far."""
        return self.published.bundle if self.published else self.run.digest if self.run else None

    @property
    def watt_hours(self) -> float | None:
        """What its training used, by `WATTS` a busy core: an estimate for comparing generations, not a measurement."""
        if self.run is None or self.run.cpu_seconds is None:
            return None
        return self.run.cpu_seconds * WATTS / 3600

    @property
    def gain(self) -> float | None:
        """By how much its Brier score was below the champion's over all judged rows; None before the first window."""
        return _over_rows(self.trials, [trial.gain for trial in self.trials])

    @property
    def gain_over_0(self) -> float | None:
        """The same, against generation 0."""
        return _over_rows(self.trials, [t.generation_0.brier - t.challenger.brier for t in self.trials])


def candidates(lake: Lake, stream: str | None = None) -> list[Candidate]:
    """All models of a stream, or of all streams, by stream and version."""
    asked = {"stream": stream}
    last = 'qualify row_number() over (partition by run_id order by "offset" desc) = 1'
    runs = _read(lake, f"select 'run' as type, * from runs where {_OF} {last}", asked, Run)
    evaluations = _read(
        lake, f"select 'evaluation' as type, * from evaluations where {_OF} order by \"offset\"", asked, Evaluation
    )
    published = _read(lake, f"from generations where {_OF} order by version", asked, Generation)
    return candidates_of(runs, evaluations, published)


def candidates_of(
    runs: Iterable[Run], evaluations: Sequence[Evaluation], generations: Iterable[Generation]
) -> list[Candidate]:
    """The same of what was said: every run as it ended, and every generation that was published."""
    published = {generation.model: generation for generation in generations}
    found = [
        Candidate(run.stream, run.version, run, _trials(run.run_id, evaluations), published.get(run.model))
        for run in runs
    ]
    found += [Candidate(g.stream, 0, None, [], g) for g in published.values() if g.version == 0]
    return sorted(found, key=lambda candidate: (candidate.stream, candidate.version))


def candidate(known: Sequence[Candidate], model: str) -> Candidate:
    """The one named `stream@version`. Raises NotFound, naming those there are."""
    for one in known:
        if one.model == model:
            return one
    there = ", ".join(one.model for one in known) or "none yet"
    raise NotFound(f"there is no model '{model}'; the lake knows {there}")


def bundle_of(config: Config, model: Candidate) -> Path:
    """The folder of a model's bundle. Raises NotFound when it was never frozen."""
    if not model.bundle:
        raise NotFound(f"{model.model} was never frozen: there is nothing to load")
    return config.model_store / model.bundle


def predictor_of(config: Config, model: Candidate) -> Predictor:
    """The model, loaded. Raises NotFound when it was never frozen, BundleError when its bundle is gone or altered."""
    from accrual.predictor import Predictor

    return Predictor.load(bundle_of(config, model), config)


def lineage(known: Sequence[Candidate], model: str) -> list[Candidate]:
    """A model and the champions it was trained to replace, back to generation 0. Raises NotFound."""
    line = [candidate(known, model)]
    while (run := line[-1].run) is not None:
        line.append(candidate(known, run.parent))
    return line


def champions(known: Sequence[Candidate]) -> list[Candidate]:
    """Those that were published, in order; the last one is in service."""
    return [one for one in known if one.published]


def _read(lake: Lake, query: str, asked: Mapping[str, object], kind: type[_Struct]) -> list[_Struct]:
    """Rows as structs; a null where a struct has a default is a column that was not there when the row was written."""
    required = {field.name for field in msgspec.structs.fields(kind) if field.required}
    rows = [
        {
            name: msgspec.json.decode(value) if name in _NESTED else dict(value) if name == "selection" else value
            for name, value in row.items()
            if value is not None or name in required
        }
        for row in lake.rows(query, asked)
    ]
    return msgspec.convert(rows, list[kind])  # type: ignore[valid-type]


def _trials(run_id: str, evaluations: Sequence[Evaluation]) -> list[Trial]:
    by_role = {(e.window, e.role): e for e in evaluations if e.run_id == run_id}
    return [
        Trial(e, by_role[window, "champion"], by_role[window, "generation-0"])
        for (window, role), e in sorted(by_role.items())
        if role == "challenger"
    ]


def _over_rows(trials: Sequence[Trial], values: Sequence[float]) -> float | None:
    rows = [trial.challenger.rows for trial in trials]
    if not sum(rows):
        return None
    return sum(value * count for value, count in zip(values, rows, strict=True)) / sum(rows)
