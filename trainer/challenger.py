"""Make a challenger: from chosen rows to a frozen bundle. A cycle makes new ones so, `rebuild.py` old ones again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accrual.bundle import Manifest
from accrual.contract import Contract, Pair, Text, shown
from accrual.encoder import Encoder, base_digest, base_folder
from accrual.errors import TrainingFailed
from accrual.generator import Generator
from accrual.output import Output
from accrual.predictor import Predictor
from accrual.scores import truth_of
from accrual.training_policy import Training
from trainer.calibrate import calibrate
from trainer.calibrate_text import calibrate_text
from trainer.finetune import Start, Tuned, fine_tune
from trainer.finetune_preference import TunedPreference, fine_tune_preference
from trainer.finetune_text import TunedText, fine_tune_text
from trainer.freeze import freeze
from trainer.ranks import Ranks
from trainer.retention import Probe, ability, attempts, keep_abilities, levered
from trainer.select import Selection
from trainer.shard import make_whole

log = logging.getLogger(__name__)

Made = Tuned | TunedText | TunedPreference


class Recipe(msgspec.Struct, frozen=True):
    """What a training is made of, for every process that takes part in it; `sharded`: each holds a part of the base."""

    base: str
    training: Training
    output: Output
    pair: Pair | None
    texts: list[Text]
    labels: list[str]
    weights: list[float]
    classes: list[str]
    seed: int
    start: Start | None
    checkpoint: Path | None
    sharded: bool


class Champion(msgspec.Struct, frozen=True):
    """The model that is to be replaced, and the folder of its bundle."""

    predictor: Predictor
    folder: Path


def make_challenger(
    store: Path,
    key: Ed25519PrivateKey,
    contract: Contract,
    manifest: Manifest,
    champion: Champion,
    selection: Selection,
    probe: Probe | None,
    checkpoint: Path | None,
    sharded: bool = False,
) -> str:
    """Train on the earlier rows, keep the base's abilities, calibrate on the latest rows, freeze; the bundle's digest.

    `manifest` says what is known before; `probe` is that of the contract's `gate.retention`. Raises TrainingFailed,
    BundleError and ConfigError (base or champion cannot be loaded), StoreUnavailable (the store takes no bundle).
    """
    before, calibration = champion.predictor, contract.training.calibration
    recipe = Recipe(
        base=manifest.base,
        training=contract.training,
        output=contract.output,
        pair=contract.pair,
        texts=[row.text for row in selection.learn],
        labels=[row.label for row in selection.learn],
        weights=[row.weight for row in selection.learn],
        classes=before.classes,
        seed=manifest.seed,
        start=start_of(contract, manifest.base, champion, selection),
        checkpoint=checkpoint,
        sharded=sharded,
    )
    if contract.gate.retention is None or probe is None:
        tuned = _train_together(recipe)
    else:
        tuned, kept = train_and_keep(recipe, probe, contract.gate.retention.most_loss)
        manifest = msgspec.structs.replace(manifest, **kept)
    manifest = msgspec.structs.replace(
        manifest, start=tuned.start, made_with=manifest.made_with | {"precision": tuned.precision}
    )
    texts, labels = [row.text for row in selection.calibrate], [row.label for row in selection.calibrate]
    weights = [row.weight for row in selection.calibrate]
    if isinstance(tuned, TunedText):
        rows = tuned.model.written([shown(text) for text in texts], labels)
        calibrator = calibrate_text(tuned.model, rows, calibration, before.calibrator, weights)
    else:
        tuned.bias[:] += np.array([selection.shift.get(name, 0.0) for name in tuned.classes], dtype=np.float32)
        truth = truth_of(contract.output, labels, tuned.classes)
        calibrator = calibrate(tuned.logits(texts), truth, calibration, before.calibrator, weights)
    return freeze(store, key, contract, manifest, tuned, calibrator, selection.rows)


def take_part() -> None:
    """Of a rank that is not the trainer's: take part in each training that it begins, until it ends.

    What goes wrong here alone ends this process: the one that started the group then starts all of it again.
    """
    while (recipe := Ranks().shared(None)) is not None:
        try:
            train(recipe)
        except TrainingFailed as exc:
            log.info("the training failed: %s", exc)


def train_and_keep(recipe: Recipe, probe: Probe, most_loss: float) -> tuple[Made, Mapping[str, Any]]:
    """Train, with one lever more each time, until the base's abilities are kept; and what the manifest says of it.

    Raises TrainingFailed when no lever keeps them.
    """
    before, lost = ability(_load(recipe), probe), []
    for levers in attempts(recipe.training):
        tuned = _train_together(_tried(recipe, levers))
        kept = keep_abilities(tuned.model, before, probe, most_loss)
        if kept.low >= -most_loss:
            said = {"adapter_scale": kept.scale, "retention": round(kept.change, 4), "probe_digest": probe.digest}
            return tuned, {"levers": levers, **said}
        by = f" by {' and '.join(levers)}" if levers else ""
        lost.append(f"the {kept.what} down to {kept.low:+.4f} at {kept.scale:g}{by}")
        log.info("the base's abilities are lost: %s", lost[-1])
    raise TrainingFailed(
        f"the base's abilities are lost: on {probe.name} {', '.join(lost)}, and gate.retention.most_loss is"
        f" {most_loss}: train less (epochs, learning_rate, lora.layers), or allow more"
    )


def _tried(recipe: Recipe, levers: Sequence[str]) -> Recipe:
    """The training with these levers. It has a checkpoint of its own: one that is through is not done again."""
    training, checkpoint = levered(recipe.training, levers), recipe.checkpoint
    if checkpoint is not None:
        checkpoint = checkpoint.with_stem(f"{checkpoint.stem}-{len(levers)}")
    return msgspec.structs.replace(recipe, training=training, checkpoint=checkpoint)


def _train_together(recipe: Recipe) -> Made:
    """Train, and have all other ranks take part."""
    Ranks().shared(recipe)
    made = train(recipe)
    if recipe.sharded or recipe.training.quantize:  # what is measured and judged is what is served
        make_whole(made.model, _load(recipe), recipe.training.lora)
    return made


def train(recipe: Recipe) -> Made:
    training, start, model = recipe.training, recipe.start, _load(recipe, recipe.training.quantize)
    adapter = start.adapter if start is not None else None
    if isinstance(model, Generator) and recipe.output.one_of_classes:
        return fine_tune_preference(
            model,
            recipe.texts,
            recipe.labels,
            recipe.output.classes,
            training,
            recipe.seed,
            weights=recipe.weights,
            start=adapter,
            checkpoint=recipe.checkpoint,
            sharded=recipe.sharded,
        )
    if isinstance(model, Generator):
        return fine_tune_text(
            model,
            [shown(text) for text in recipe.texts],
            recipe.labels,
            training,
            recipe.seed,
            weights=recipe.weights,
            start=adapter,
            checkpoint=recipe.checkpoint,
            sharded=recipe.sharded,
        )
    return fine_tune(
        model,
        recipe.texts,
        recipe.labels,
        recipe.classes,
        training,
        recipe.seed,
        weights=recipe.weights,
        start=start,
        checkpoint=recipe.checkpoint,
        output=recipe.output,
        sharded=recipe.sharded,
    )


def _load(recipe: Recipe, quantize: Literal["4bit", "8bit"] | None = None) -> Encoder | Generator:
    """A fresh copy of the base."""
    folder, training = base_folder(recipe.base), recipe.training
    if recipe.output.writes:
        return Generator.load(folder, training.max_tokens, recipe.output.max_new_tokens, quantize=quantize)
    return Encoder.load(folder, training.max_tokens, quantize=quantize, pair=recipe.pair)


def start_of(contract: Contract, base: str, champion: Champion, selection: Selection) -> Start | None:
    """What a warm start goes on from; None where the contract wants none, or generation 0 has nothing to give.

    The champion speaks of the natural shares, the selection may have others: its shift is taken off, to be added again
    in the end.
    """
    adapter, before = champion.folder / "adapter", champion.predictor
    if contract.training.start == "base" or not adapter.is_dir():
        return None
    if contract.training.cohort != "mature":
        log.warning("training.start: %s has learned from young rows, which calibrate: starts from base", before.model)
        return None
    if before.manifest.base_digest != base_digest(base_folder(base)) or before.contract.pair != contract.pair:
        log.warning("training.start: %s has another base, or another kind of rows: starts from base", before.model)
        return None
    if before.weight is None:
        return Start(adapter, np.zeros((0, 0), dtype=np.float32), before.bias)
    shift = [selection.shift.get(name, 0.0) for name in before.classes]
    return Start(adapter, before.weight, before.bias - np.array(shift, dtype=np.float32))
