"""Outcomes that name a business key, an *entity*, instead of a prediction: to which predictions they belong. Pure.

A contract with `join` has these. The first thing the join then has to say of an outcome is whose it is: the latest
prediction made for the entity before it, or all of them, within the horizon. It says so once the watermark has passed
the outcome, because by then every prediction before it has come; from there on the outcome is one of its prediction's
(`streams.join`). So that no label is taken back, a prediction that comes later still, and to which an outcome would
belong that was given away, is refused.

Times are microseconds since 1970, as in `streams.join`.
"""

from __future__ import annotations

import msgspec

from accrual.contract import Contract
from streams.join import Letter, Waiting, digest, orphan_letter


class Made(msgspec.Struct, frozen=True, array_like=True, gc=False, order=True):
    """A prediction of the entity. They order by when they were made."""

    predicted_at: int
    prediction_id: str


class Given(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An outcome whose predictions have been found, or that there are none."""

    observed_at: int
    digest: bytes


class Entity(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is known of one entity: its predictions in order, the outcomes that wait, and those that were given away."""

    made: tuple[Made, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    given: tuple[Given, ...] = ()


class Claim(msgspec.Struct, frozen=True, gc=False):
    """An outcome and the prediction it belongs to."""

    prediction_id: str
    outcome: Waiting


class Passed(msgspec.Struct, frozen=True, gc=False):
    """What follows from the passing of time: the next entity (None: nothing is known any more), claims, orphans."""

    entity: Entity | None
    claims: tuple[Claim, ...] = ()
    orphans: tuple[Letter, ...] = ()


unpack_entity = msgspec.msgpack.Decoder(Entity).decode


def is_refused(entity: Entity | None, contract: Contract, made: Made) -> bool:
    """Whether an outcome that would belong to a new prediction was given away before it came."""
    if entity is None:
        return False
    all_made = add_prediction(entity, made).made
    return any(made in _owners(all_made, contract, given.observed_at) for given in entity.given)


def add_prediction(entity: Entity | None, made: Made) -> Entity:
    """The entity with one more prediction."""
    entity = Entity() if entity is None else entity
    return Entity(tuple(sorted((*entity.made, made))), entity.waiting, entity.given)


def add_outcome(entity: Entity | None, outcome: Waiting) -> Entity | None:
    """The entity with one more outcome, that waits; None if it is known already."""
    entity = Entity() if entity is None else entity
    content = digest(outcome.seen)
    if any(given.digest == content for given in entity.given):
        return None
    if any(digest(waiting.seen) == content for waiting in entity.waiting):
        return None
    return Entity(entity.made, (*entity.waiting, outcome), entity.given)


def on_time(entity: Entity, contract: Contract, watermark: int) -> Passed:
    """Event time has come as far as `watermark`: find the predictions of outcomes that it has passed, and forget."""
    passed = sorted((w for w in entity.waiting if w.seen.observed_at < watermark), key=lambda w: w.seen)
    claims: list[Claim] = []
    orphans: list[Letter] = []
    made = tuple(made for made in entity.made if _forgotten_after(contract, made.predicted_at) >= watermark)
    for outcome in passed:
        owners = _owners(made, contract, outcome.seen.observed_at)
        claims += [Claim(owner.prediction_id, outcome) for owner in owners]
        if not owners:
            orphans.append(orphan_letter(outcome, "no prediction of its entity was made within the horizon before it"))
    given = (*entity.given, *(Given(w.seen.observed_at, digest(w.seen)) for w in passed))
    left = Entity(
        made,
        tuple(w for w in entity.waiting if w.seen.observed_at >= watermark),
        tuple(g for g in given if _forgotten_after(contract, g.observed_at) >= watermark),
    )
    return Passed(left if left != Entity() else None, tuple(claims), tuple(orphans))


def due(entity: Entity, contract: Contract) -> int:
    """The watermark at which `on_time` next has something to do for this entity."""
    soonest = [w.seen.observed_at for w in entity.waiting]
    soonest += [_forgotten_after(contract, made.predicted_at) for made in entity.made[:1]]
    soonest += [_forgotten_after(contract, given.observed_at) for given in entity.given]
    return min(soonest) + 1


def _owners(made: tuple[Made, ...], contract: Contract, observed_at: int) -> tuple[Made, ...]:
    """Of an entity's predictions, those that an outcome belongs to."""
    candidates = tuple(m for m in made if m.predicted_at <= observed_at <= m.predicted_at + contract.horizon_us)
    return candidates if contract.join is not None and contract.join.to == "all" else candidates[-1:]


def _forgotten_after(contract: Contract, moment: int) -> int:
    return moment + contract.horizon_us + contract.remember_us
