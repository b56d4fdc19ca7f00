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
from accrual.contract import Training as Options
from accrual.encoder import Encoder, base_folder
from accrual.errors import TrainingFailed
from accrual.generator import Generator
from accrual.output import Output
from accrual.predictor import Predictor
from accrual.scores import truth_of
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


class Training(msgspec.Struct, frozen=True):
    """What a training is made of, for every process that takes part in it; `sharded`: each holds a part of the base."""

    base: str
    options: Options
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
    options, before = contract.training, champion.predictor
    training = Training(
        base=manifest.base,
        options=options,
        output=contract.output,
        pair=contract.pair,
        texts=[row.text for row in selection.learn],
        labels=[row.label for row in selection.learn],
        weights=[row.weight for row in selection.learn],
        classes=before.classes,
        seed=manifest.seed,
        start=_start(contract, champion, selection),
        checkpoint=checkpoint,
        sharded=sharded,
    )
    if contract.gate.retention is None or probe is None:
        tuned = _train_together(training)
    else:
        tuned, kept = _train_and_keep(training, probe, contract.gate.retention.most_loss)
        manifest = msgspec.structs.replace(manifest, **kept)
    manifest = msgspec.structs.replace(
        manifest, start=tuned.start, made_with=manifest.made_with | {"precision": tuned.precision}
    )
    texts, labels = [row.text for row in selection.calibrate], [row.label for row in selection.calibrate]
    weights = [row.weight for row in selection.calibrate]
    if isinstance(tuned, TunedText):
        rows = tuned.model.written([shown(text) for text in texts], labels)
        calibrator = calibrate_text(tuned.model, rows, options.calibration, before.calibrator, weights)
    else:
        tuned.bias[:] += np.array([selection.shift.get(name, 0.0) for name in tuned.classes], dtype=np.float32)
        truth = truth_of(contract.output, labels, tuned.classes)
        calibrator = calibrate(tuned.logits(texts), truth, options.calibration, before.calibrator, weights)
    return freeze(store, key, contract, manifest, tuned, calibrator, selection.rows)


def take_part() -> None:
    """Of a rank that is not the trainer's: take part in each training that it begins, until it ends.

    What goes wrong here alone ends this process: the one that started the group then starts all of it again.
    """
    while (training := Ranks().shared(None)) is not None:
        try:
            _train(training)
        except TrainingFailed as exc:
            log.info("the training failed: %s", exc)


def _train_and_keep(training: Training, probe: Probe, most_loss: float) -> tuple[Made, Mapping[str, Any]]:
    """Train, with one lever more each time, until the base's abilities are kept; and what the manifest says of it.

    Raises TrainingFailed when no lever keeps them.
    """
    before, lost = ability(_load(training), probe), []
    for levers in attempts(training.options):
        tuned = _train_together(_tried(training, levers))
        kept = keep_abilities(tuned.model, before, probe, most_loss)
        if kept.low >= -most_loss:
            return tuned, {"levers": levers, "adapter_scale": kept.scale, "retention": round(kept.change, 4)}
        by = f" by {' and '.join(levers)}" if levers else ""
        lost.append(f"the {kept.what} down to {kept.low:+.4f} at {kept.scale:g}{by}")
        log.info("the base's abilities are lost: %s", lost[-1])
    raise TrainingFailed(
        f"the base's abilities are lost: on {probe.name} {', '.join(lost)}, and gate.retention.most_loss is"
        f" {most_loss}: train less (epochs, learning_rate, lora.layers), or allow more"
    )


def _tried(training: Training, levers: Sequence[str]) -> Training:
    """The training with these levers. It has a checkpoint of its own: one that is through is not done again."""
    options, checkpoint = levered(training.options, levers), training.checkpoint
    if checkpoint is not None:
        checkpoint = checkpoint.with_stem(f"{checkpoint.stem}-{len(levers)}")
    return msgspec.structs.replace(training, options=options, checkpoint=checkpoint)


def _train_together(training: Training) -> Made:
    """Train, and have all other ranks take part."""
    Ranks().shared(training)
    made = _train(training)
    if training.sharded:
        make_whole(made.model, _load(training), training.options.lora)
    return made


def _train(training: Training) -> Made:
    options, start, model = training.options, training.start, _load(training, training.options.quantize)
    adapter = start.adapter if start is not None else None
    if isinstance(model, Generator) and training.output.one_of_classes:
        return fine_tune_preference(
            model,
            training.texts,
            training.labels,
            training.output.classes,
            options,
            training.seed,
            weights=training.weights,
            start=adapter,
            checkpoint=training.checkpoint,
            sharded=training.sharded,
        )
    if isinstance(model, Generator):
        return fine_tune_text(
            model,
            [shown(text) for text in training.texts],
            training.labels,
            options,
            training.seed,
            weights=training.weights,
            start=adapter,
            checkpoint=training.checkpoint,
            sharded=training.sharded,
        )
    return fine_tune(
        model,
        training.texts,
        training.labels,
        training.classes,
        options,
        training.seed,
        weights=training.weights,
        start=start,
        checkpoint=training.checkpoint,
        output=training.output,
        sharded=training.sharded,
    )


def _load(training: Training, quantize: Literal["4bit", "8bit"] | None = None) -> Encoder | Generator:
    """A fresh copy of the base."""
    folder, options = base_folder(training.base), training.options
    if training.output.writes:
        return Generator.load(folder, options.max_tokens, training.output.max_new_tokens, quantize=quantize)
    return Encoder.load(folder, options.max_tokens, quantize=quantize, pair=training.pair)


def _start(contract: Contract, champion: Champion, selection: Selection) -> Start | None:
    """What a warm start goes on from; None where the contract wants none, or generation 0 has nothing to give.

    The champion speaks of the natural shares, the selection may have others: its shift is taken off, to be added again
    in the end.
    """
    adapter, before = champion.folder / "adapter", champion.predictor
    if contract.training.start == "base" or not adapter.is_dir():
        return None
    if before.weight is None:
        return Start(adapter, np.zeros((0, 0), dtype=np.float32), before.bias)
    shift = [selection.shift.get(name, 0.0) for name in before.classes]
    return Start(adapter, before.weight, before.bias - np.array(shift, dtype=np.float32))
