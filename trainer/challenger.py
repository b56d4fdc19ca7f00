"""Make a challenger: from chosen rows to a frozen bundle. A cycle makes new ones so, `rebuild.py` old ones again."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accrual.bundle import Manifest
from accrual.contract import Contract, Pair, Text
from accrual.contract import Training as Options
from accrual.encoder import Encoder, base_folder
from accrual.errors import TrainingFailed
from accrual.output import Output
from accrual.predictor import Predictor
from accrual.scores import truth_of
from trainer.calibrate import calibrate
from trainer.finetune import Start, Tuned, fine_tune
from trainer.freeze import freeze
from trainer.ranks import Ranks
from trainer.retention import Probe, keep_abilities
from trainer.select import Selection

log = logging.getLogger(__name__)


class Training(msgspec.Struct, frozen=True):
    """What a training is made of, for every process that takes part in it."""

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
    )
    Ranks().shared(training)
    tuned = _train(training)
    tuned.bias[:] += np.array([selection.shift.get(name, 0.0) for name in tuned.classes], dtype=np.float32)
    manifest = msgspec.structs.replace(
        manifest, start=tuned.start, made_with=manifest.made_with | {"precision": tuned.precision}
    )
    if contract.gate.retention is not None and probe is not None:
        base = Encoder.load(base_folder(manifest.base), options.max_tokens)
        scale, retention = keep_abilities(tuned.encoder, base, probe, contract.gate.retention.most_loss)
        manifest = msgspec.structs.replace(manifest, adapter_scale=scale, retention=retention)
    logits = tuned.logits([row.text for row in selection.calibrate])
    truth = truth_of(contract.output, [row.label for row in selection.calibrate], tuned.classes)
    calibrator = calibrate(logits, truth, options.calibration, before.calibrator)
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


def _train(training: Training) -> Tuned:
    options = training.options
    encoder = Encoder.load(
        base_folder(training.base), options.max_tokens, quantize=options.quantize, pair=training.pair
    )
    return fine_tune(
        encoder,
        training.texts,
        training.labels,
        training.classes,
        options,
        training.seed,
        weights=training.weights,
        start=training.start,
        checkpoint=training.checkpoint,
        output=training.output,
    )


def _start(contract: Contract, champion: Champion, selection: Selection) -> Start | None:
    """What a warm start goes on from; None where the contract wants none, or generation 0 has nothing to give.

    The champion speaks of the natural shares, the selection may have others: its shift is taken off, to be added again
    in the end.
    """
    adapter, before = champion.folder / "adapter", champion.predictor
    if contract.training.start == "base" or before.weight is None or not adapter.is_dir():
        return None
    shift = [selection.shift.get(name, 0.0) for name in before.classes]
    return Start(adapter, before.weight, before.bias - np.array(shift, dtype=np.float32))
