"""The contract's `training` and `gate`: how challengers are made, when, of which rows, and what they must prove.

They are carried out by the trainer; here they are read and checked. What each means is in docs/training-data.md,
docs/fine-tuning.md and docs/judging.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import msgspec

OBSERVED_WARNING = (
    "`training.cohort: observed` teaches the shares of labels that come early, which are most often wrong"
    " (docs/maturity.md); use mature, or ipw"
)


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs that say whether the model's own decision shaped a row's outcome.

    `holdout` (boolean): the row was left alone, whatever the model said: it counts fully. `propensity` (number): with
    which probability it was left alone; it then counts by the inverse. `exposure` (boolean): the decision was carried
    out; such a row counts `weight`. Without `exposure` every row that is not held out is taken for exposed.
    """

    exposure: str | None = None
    holdout: str | None = None
    propensity: str | None = None
    weight: float = 1.0


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A metric of the lake's table `quality` that sets off a run where it is `most` or more, of `field` or of any."""

    most: float
    metric: Literal["psi", "jensen_shannon"] = "psi"
    field: str | None = None


class Decline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much worse than at its promotion the champion may be on the last sealed window, before a run is set off."""

    brier: float | None = None
    ece: float | None = None


class Triggers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What sets off a run, any of it: `rows`, `every`, `drift`, `decline`, `recalled`. None of them: every new window.

    `rows`: so many rows to learn from in new windows. `every`: so much event time since the last run's window.
    `recalled`: so many rows of the windows that the champion learned from were relabeled, erased or put in quarantine
    since.

    `cooldown`, `runs_per_day` and `least_gain` hold a run back whatever set it off. `least_gain`: the Brier score that
    a second of training must be expected to save, over as many rows as came since the last run.
    """

    rows: int | None = None
    every: str | None = None
    drift: Drift | None = None
    decline: Decline | None = None
    recalled: int | None = None
    cooldown: str | None = None
    runs_per_day: int | None = None
    least_gain: float | None = None


class Lora(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the linear maps of the top `layers` layers.

    `targets`: ends of the maps' names (`query`); none means all. `modules_to_save`: ends of names of modules there
    that are trained whole. `rslora`: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732). `dora`:
    adapt direction and size apart (Liu et al. 2024, arXiv:2402.09353).
    """

    rank: int = 8
    alpha: int = 16
    layers: int = 2
    targets: list[str] = []
    modules_to_save: list[str] = []
    rslora: bool = False
    dora: bool = False


class EarlyStopping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stop after `patience` epochs without a lower loss on the latest `share` of the rows, which are not learned
    from."""

    share: float = 0.1
    patience: int = 1


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a challenger is made. `template` renders the inputs to text: `{field}` is replaced by its value.

    `second_template`: for a row that is a pair of texts, the second one: two to choose from, or to compare.
    `completions`: where a text that was written is judged, what it is; of a preference both. `template` is its prompt.
    `beta`: how far from the base such judgements may lead: the implicit reward is so much times the log-ratio.
    `maturity`: the share of the labels to come that must be there before a window is sealed, by the measured delays;
    1 waits for the horizon. `calibration`: the method, or `auto` for the one that rows held out speak for.
    `held_out`: the share of all rows that no generation learns from, so that all can be compared on them.
    `cohort`: whether rows that are younger than the sealed windows are learned from too (docs/maturity.md).
    `prefer`, `replay_by`, `balance`, `control`: which rows, and what each counts (docs/training-data.md).
    `start`: from the base model, or from the champion's adapter and head. `accumulate`: batches a step.
    `distill`: how much it counts that general text is answered as the base does (trainer/distill.py).
    `gradient_checkpointing`: compute states again instead of keeping them. `checkpoint_steps`: steps from one
    checkpoint to the next. `quantize`: hold the base in fewer bits while training; needs CUDA.
    """

    template: str
    second_template: str | None = None
    completions: list[str] = []
    beta: float = 0.1
    window_rows: int = 1000
    maturity: float = 1.0
    held_out: float = 0.05
    max_rows: int = 100_000
    base_model: str | None = None
    replay: float = 0.5
    epochs: int = 3
    learning_rate: float = 1e-3
    max_tokens: int = 128
    lora: Lora = msgspec.field(default_factory=Lora)
    distill: float = 0.0
    start: Literal["base", "champion"] = "base"
    early_stopping: EarlyStopping | None = None
    accumulate: int = 1
    gradient_checkpointing: bool = False
    checkpoint_steps: int = 50
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    quantize: Literal["4bit", "8bit"] | None = None
    calibration: Literal["auto", "none", "temperature", "platt", "beta", "isotonic"] = "auto"
    seed: int = 17
    cohort: Literal["mature", "ipw", "observed"] = "mature"
    prefer: Literal["newest", "uncertain", "rare"] = "newest"
    replay_by: Literal["random", "label", "slice"] = "random"
    balance: Literal["none", "sqrt", "equal"] = "none"
    control: Control | None = None
    triggers: Triggers = msgspec.field(default_factory=Triggers)


class Slices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parts of the rows, one for each value of each of `fields` (inputs), in which no challenger may be much worse.

    `most_loss`: by how much its Brier score may be above the champion's. `least_rows`: a slice with fewer need not
    prove that it is not.
    """

    fields: list[str]
    most_loss: float = 0.05
    least_rows: int = 300


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the base model could do must not be lost. `probe`: `stsb`, or a CSV file of sentence, sentence, similarity;
    where the model writes, `writing`, or a CSV file of prompt, completion.

    `most_loss`: by how much the challenger's rank correlation with those similarities may be below the base's, or its
    mean log-likelihood of a completion's tokens.
    """

    probe: str
    most_loss: float = 0.02


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a challenger is promoted.

    `alpha`: the chance, over the stream's whole life, that a challenger no better than its champion is published.
    `patience`: judged windows after which an undecided challenger is given up.
    `max_ece_increase`: guard on calibration, in units of probability. `slices`, `retention`: guards, none by default.
    """

    alpha: float = 0.05
    patience: int = 3
    max_ece_increase: float = 0.05
    slices: Slices | None = None
    retention: Retention | None = None


def policy_mistakes(training: Training, gate: Gate, inputs: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is out of range, over inputs (name → type), as (contract field, problem and fix)."""
    stopping = training.early_stopping
    bounds: list[tuple[str, bool, str]] = [
        ("training.window_rows", training.window_rows >= 10, "must be at least 10"),
        ("training.maturity", 0.5 <= training.maturity <= 1, "is a share of the labels to come: 0.5 to 1"),
        ("training.held_out", 0 <= training.held_out <= 0.5, "is a share of the rows: 0 to 0.5"),
        ("training.max_rows", training.max_rows >= 10, "must be at least 10"),
        ("training.replay", 0 <= training.replay <= 10, "is a share of the new rows: 0 to 10"),
        ("training.epochs", training.epochs >= 1, "must be at least 1"),
        ("training.learning_rate", 0 < training.learning_rate < 1, "must lie between 0 and 1"),
        ("training.max_tokens", training.max_tokens >= 8, "must be at least 8"),
        ("training.beta", training.beta > 0, "must be above 0"),
        (
            "training.lora",
            min(training.lora.rank, training.lora.alpha, training.lora.layers) >= 1,
            "rank, alpha and layers must be at least 1",
        ),
        ("training.distill", 0 <= training.distill <= 1000, "is a weight: 0 (no general text) to 1000"),
        ("training.accumulate", training.accumulate >= 1, "must be at least 1"),
        ("training.checkpoint_steps", training.checkpoint_steps >= 1, "must be at least 1"),
        (
            "training.early_stopping.share",
            stopping is None or 0 < stopping.share <= 0.5,
            "is a share of the rows: above 0, at most 0.5",
        ),
        ("training.early_stopping.patience", stopping is None or stopping.patience >= 1, "must be at least 1"),
        ("gate.alpha", 0 < gate.alpha < 1, "is a probability: between 0 and 1"),
        ("gate.patience", gate.patience >= 1, "must be at least 1"),
        ("gate.max_ece_increase", 0 <= gate.max_ece_increase <= 1, "is a difference of probabilities: 0 to 1"),
    ]
    found: list[tuple[str, str]] = []
    if gate.slices is not None:
        found += _unsliceable(gate.slices.fields, inputs)
        bounds += [
            ("gate.slices.most_loss", 0 < gate.slices.most_loss < 2, "is a Brier score: between 0 and 2"),
            ("gate.slices.least_rows", gate.slices.least_rows >= 10, "must be at least 10"),
        ]
    if gate.retention is not None:
        bounds.append(("gate.retention.most_loss", 0 < gate.retention.most_loss < 1, "must lie between 0 and 1"))
    return found + [(field, problem) for field, fine, problem in bounds if not fine]


def control_mistakes(
    control: Control, inputs: Mapping[str, str], in_template: Collection[str]
) -> list[tuple[str, str]]:
    """What is wrong with the section over inputs (name → type), as (contract field, problem and fix)."""
    found: list[tuple[str, str]] = []
    for name, kind in (("exposure", "boolean"), ("holdout", "boolean"), ("propensity", "number")):
        given = getattr(control, name)
        if given is None:
            continue
        if inputs.get(given) != kind:
            problem = f"'{given}' is not an input of `type: {kind}`"
        elif given in in_template:
            problem = f"'{given}' is in training.template: the model would learn from it; take it out there"
        else:
            continue
        found.append((f"training.control.{name}", problem))
    if control.exposure is None and control.holdout is None:
        found.append(("training.control", "name an input as `holdout` or as `exposure`, or leave the section out"))
    if control.propensity is not None and control.holdout is None:
        found.append(("training.control.propensity", "is the probability of being held out: name `holdout` too"))
    if not 0 <= control.weight <= 1:
        found.append(("training.control.weight", "is what an exposed row counts: 0 to 1"))
    return found


def trigger_mistakes(triggers: Triggers, inputs: Collection[str], measured: bool) -> list[tuple[str, str]]:
    """The same for `training.triggers`, durations left out; `measured` says that windows have quality metrics."""
    found = [
        (f"training.triggers.{name}", "must be at least 1")
        for name in ("rows", "recalled", "runs_per_day")
        if (value := getattr(triggers, name)) is not None and value < 1
    ]
    drift, decline = triggers.drift, triggers.decline
    if drift is not None:
        if not measured:
            found.append(("training.triggers.drift", "is measured by `quality`: add that section, it may be `{}`"))
        if drift.most <= 0:
            found.append(("training.triggers.drift.most", "must be above 0"))
        if drift.field is not None and drift.field not in (*inputs, "label"):
            found.append(("training.triggers.drift.field", f"must be one of {', '.join(inputs)}, label"))
    if decline is not None and (
        (decline.brier is None and decline.ece is None) or min(decline.brier or 1.0, decline.ece or 1.0) <= 0
    ):
        found.append(("training.triggers.decline", "give brier, ece or both, above 0"))
    if triggers.least_gain is not None and triggers.least_gain <= 0:
        found.append(("training.triggers.least_gain", "must be above 0; leave it out to train whatever it costs"))
    return found


def _unsliceable(fields: list[str], inputs: Mapping[str, str]) -> list[tuple[str, str]]:
    found = [
        ("gate.slices.fields", f"'{name}' is not one of inputs ({', '.join(inputs)})")
        for name in fields
        if name not in inputs
    ]
    found += [
        ("gate.slices.fields", f"'{name}' is a number: slices are by inputs of few values")
        for name in fields
        if inputs.get(name) == "number"
    ]
    return found or ([] if fields else [("gate.slices.fields", "name an input")])
