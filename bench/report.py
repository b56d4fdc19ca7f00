"""The figures of all runs as a table in Markdown, medians over the rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arena import Cost
from check import Verdict

_HEADINGS = (
    "contender",
    "events",
    "events / CPU s",
    "to Kafka Streams",
    "once warm",
    "to Kafka Streams",
    "CPU s",
    "wall s",
    "peak RSS MiB",
    "broker CPU s",
    "half load, events/s",
    "p50 ms",
    "p99 ms",
    "output",
)


@dataclass(frozen=True)
class Result:
    """One run: what it cost, and how its output compares with what it must be (None: it has no output)."""

    contender: str
    round: int
    cost: Cost
    verdict: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file, which knows no NaN."""
        known = {name: None if math.isnan(value) else value for name, value in asdict(self.cost).items()}
        return {**asdict(self), "cost": known}


@dataclass(frozen=True)
class Delay:
    """Event to ground truth at half load, in milliseconds."""

    contender: str
    rate: float
    p50_ms: float
    p99_ms: float
    rows: int


def table(results: Sequence[Result], delays: Sequence[Delay], reference: str = "kafka-streams") -> str:
    """A row a contender, in the order they first ran; the ratio is that of events per CPU second to `reference`."""
    names = list(dict.fromkeys(result.contender for result in results))
    by_name = {name: [result for result in results if result.contender == name] for name in names}
    speed = {name: _median(runs, "per_cpu_s") for name, runs in by_name.items()}
    warm = {name: _median(runs, "warm_per_cpu_s") for name, runs in by_name.items()}
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---|" + "---:|" * (len(_HEADINGS) - 2) + "---|"]
    for name, runs in by_name.items():
        delay = next((delay for delay in delays if delay.contender == name), None)
        late = [f"{delay.rate:,.0f}", f"{delay.p50_ms:,.0f}", f"{delay.p99_ms:,.0f}"] if delay else ["", "", ""]
        cells = [
            name,
            f"{runs[0].cost.events:,}",
            f"{speed[name]:,.0f}",
            _ratio(speed, name, reference),
            _figure(warm[name], ",.0f"),
            _ratio(warm, name, reference),
            f"{_median(runs, 'cpu_s'):,.1f}",
            f"{_median(runs, 'wall_s'):,.1f}",
            f"{_median(runs, 'peak_mib'):,.0f}",
            f"{_median(runs, 'broker_cpu_s'):,.1f}",
            *late,
            "; ".join(sorted({str(run.verdict) for run in runs if run.verdict})),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(figures: dict[str, float], name: str, reference: str) -> str:
    return _figure(figures[name] / figures.get(reference, math.nan), ".2f")


def _figure(value: float, form: str) -> str:
    return "" if math.isnan(value) else f"{value:{form}}"


def _median(runs: Sequence[Result], what: str) -> float:
    """Over the runs that have a figure; NaN when none has."""
    known = [value for run in runs if not math.isnan(value := getattr(run.cost, what))]
    return statistics.median(known) if known else math.nan
