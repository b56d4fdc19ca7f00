"""The contract's `training.control` and `training.triggers`: which rows the model itself shaped; when it is trained.

They are carried out by the trainer (`trainer/select.py`, `trainer/triggers.py`); here they are read and checked. What
each means is in docs/training-data.md.
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
