"""What the trainer says: the ledger of runs and evaluations, and the announcement of a champion; what people decide.

`Run` and `Evaluation` go to the training topic, `Generation` to the models topic (compacted, keyed by stream). One
Kafka transaction carries a verdict with all its records, so that a trainer that is killed and restarted repeats none.
`Decision` goes to the training topic too, since the sink is the lake's writer (docs/decisions/0005).
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from accrual.events import VERSION, Time


class Bin(msgspec.Struct, frozen=True):
    """A point of a reliability curve: the mean probability that was said, and how often it happened, on `rows`."""

    said: float
    happened: float
    rows: int


class SliceScores(msgspec.Struct, frozen=True):
    """A model on the rows of a window that are in one slice (`grade=C`).

    `loss_at_most`, only of a challenger and with enough rows: by how much its Brier score there may be above its
    champion's, on all windows judged so far; all of its bounds hold together, whenever one looks.
    """

    name: str
    rows: int
    accuracy: float
    brier: float
    loss_at_most: float | None = None


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A published model: the champion of its stream from now on.

    `model` is `stream@version`, as predictions name it. `bundle` is its folder under the model store;
    `digest` is the SHA-256 of the manifest, which in turn names every file's. `windows` are those it was trained on;
    it learned from no prediction of `learned_until` or later (None: of no window after those).
    """

    v: int = VERSION
    stream: str
    version: int
    model: str
    digest: str
    bundle: str
    run_id: str
    parent: str | None
    windows: list[int]
    rows: int
    published_at: Time
    learned_until: Time | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="type"):
    """One training run, written at each change of `state`; the last record of a `run_id` holds.

    `retention`: how far the model is above the base on the contract's probe, mostly below 0 (docs/judging.md).
    `trigger`: what set it off. `selection`: how many rows were chosen, and how many not and why. `learned_until`: as of
    a `Generation`. `seconds` is what training took, `cpu_seconds` on all cores, `at` when the state was said.
    """

    v: int = VERSION
    run_id: str
    stream: str
    version: int
    parent: str
    windows: list[int]
    snapshot_id: int
    rows_new: int
    rows_replayed: int
    seed: int
    digest: str | None
    state: Literal["trained", "waiting", "promoted", "rejected", "failed"]
    reason: str
    seconds: float
    cpu_seconds: float | None = None
    retention: float | None = None
    at: Time
    trigger: str = ""
    selection: dict[str, int] = {}
    learned_until: Time | None = None

    @property
    def model(self) -> str:
        """`stream@version`, as predictions name it."""
        return f"{self.stream}@{self.version}"

    def as_generation(self, at: datetime) -> Generation:
        """What is announced when the run's model is published `at` this time."""
        digest = self.digest or ""
        return Generation(
            stream=self.stream,
            version=self.version,
            model=self.model,
            digest=digest,
            bundle=digest,
            run_id=self.run_id,
            parent=self.parent,
            windows=self.windows,
            rows=self.rows_new + self.rows_replayed,
            published_at=at,
            learned_until=self.learned_until,
        )


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, tag="evaluation", tag_field="type"):
    """One model scored on one sealed window that neither it nor its rivals were trained on.

    `auroc` only for two classes, `rank_correlation` (Spearman's, with the labels) only for a score. `coverage` is the
    share of the window's predictions that have a label; of `outside` rows the label is none of the model's classes, so
    it was certain to be wrong (None: not known). `calibration_error` is the debiased one of accrual.scores;
    `intervals` has the 95% confidence interval, low and high, of `accuracy`, `brier`, `log_loss`, `ece` and `auroc`;
    `reliability` is the curve. `e_value` and `verdict` only for a challenger: the evidence so far that it beats the
    champion, and what the gate made of it.
    """

    v: int = VERSION
    stream: str
    run_id: str
    window: int
    model: str
    role: Literal["challenger", "champion", "generation-0"]
    rows: int
    accuracy: float
    auroc: float | None
    brier: float
    log_loss: float
    ece: float
    coverage: float
    calibration_error: float | None = None
    rank_correlation: float | None = None
    outside: int | None = None
    intervals: dict[str, tuple[float, float]] = {}
    reliability: list[Bin] = []
    slices: list[SliceScores] = []
    e_value: float | None = None
    verdict: Literal["promote", "reject", "wait"] | None = None
    at: Time


class Decision(msgspec.Struct, frozen=True, kw_only=True, tag="decision", tag_field="type"):
    """What a person decided about a row in quarantine: its whole entry there, with the new `state`, `by` and `note`."""

    v: int = VERSION
    stream: str
    window: int
    prediction_id: str
    revision: int
    rule: str
    detail: str
    state: Literal["released", "rejected"]
    by: str
    note: str
    at: Time


LedgerEntry = Run | Evaluation | Decision
decode_ledger_entry = msgspec.json.Decoder(LedgerEntry).decode
decode_generation = msgspec.json.Decoder(Generation).decode
