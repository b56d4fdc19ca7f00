"""Retention: what the base model could do, its adapted copy must still do.

Fine-tuning on one task moves an encoder away from the general sense of sentences. So before it is frozen, a challenger
is asked how alike the sentences of a **probe** are, pairs of which people have said it. Its answers are the cosines
of its vectors; what counts is Spearman's correlation (1904) of these with the people's, compared with that of the bare
base model, which is generation 0's: so small losses do not add up from one generation to the next. The pairs are a
sample, hence a bound: the lower end of the 95% interval of the difference, by a bootstrap that draws the same pairs for
both (Efron 1979), must not be below `-gate.retention.most_loss`.

A generator is asked for the sentences themselves: how likely it finds each token of them. The mean of the logarithms
is that of its perplexity on general text with the sign turned, and bounded in the same way.

Where it is, there is a lever. An adapter adds its part to the base's weights; multiplied with less than 1 it keeps more
of the base and less of the task (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", CVPR,
arXiv:2109.01903). The largest of `SCALES` that passes is taken.
"""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from accrual.encoder import Encoder
from accrual.errors import ContractError, TrainingFailed
from accrual.generator import Generator

log = logging.getLogger(__name__)

SCALES = (1.0, 0.7, 0.5, 0.35)
RESAMPLES = 500
FEWEST_PAIRS = 50
_NAMED = {"stsb": Path(__file__).parent / "probes" / "stsb.csv"}


class Probe(msgspec.Struct, frozen=True):
    """Pairs of sentences, and how alike people find them."""

    name: str
    first: list[str]
    second: list[str]
    similarity: NDArray[np.float64]


def read_probe(name: str) -> Probe:
    """A named probe, or a CSV file of sentence, sentence, similarity, with or without a line of headings.

    Raises ContractError when it cannot be read or is too small to say anything.
    """
    path = _NAMED.get(name, Path(name))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        rows = [(first, second, float(similarity)) for first, second, similarity in lines[_has_headings(lines) :]]
    except OSError as exc:
        named = ", ".join(_NAMED)
        raise ContractError(
            f"gate.retention.probe: '{name}' is none of {named}, and as a file it cannot be read: {exc.strerror}"
        ) from exc
    except (ValueError, csv.Error) as exc:
        raise ContractError(
            f"gate.retention.probe: {path}: a line is not `sentence,sentence,similarity` with a number: {exc}"
        ) from exc
    if len(rows) < FEWEST_PAIRS:
        raise ContractError(f"gate.retention.probe: {path} has {len(rows)} pairs; give at least {FEWEST_PAIRS}")
    first, second, similarity = zip(*rows, strict=True)
    return Probe(name, list(first), list(second), np.array(similarity))


def keep_abilities(
    model: Encoder | Generator, base: Encoder | Generator, probe: Probe, most_loss: float
) -> tuple[float, float]:
    """Leave the model's adapter at the largest scale that keeps the base's abilities; that scale, and the change.

    The change is of the rank correlation on the probe or, of a generator, of the log-likelihood of a token. Raises
    TrainingFailed when no scale keeps them.
    """
    writes = isinstance(model, Generator)
    what = "log-likelihood of a token" if writes else "correlation"
    before = ability(base, probe)
    said = []
    for scale in SCALES:
        scale_adapter(model, scale)
        now = ability(model, probe)
        change, low = kept(before, now) if writes else retained(probe, before, now)
        log.info("%s: %s %+.4f (at least %+.4f) with the adapter at %g", probe.name, what, change, low, scale)
        if low >= -most_loss:
            return scale, round(change, 4)
        said.append(f"{low:+.4f} at {scale:g}")
    raise TrainingFailed(
        f"the base's abilities are lost: on {probe.name} the {what} may have changed by {', '.join(said)}, and"
        f" gate.retention.most_loss is {most_loss}: train less (epochs, learning_rate, lora.layers), or allow more"
    )


def ability(model: Encoder | Generator, probe: Probe) -> NDArray[np.float64]:
    """What a model says of the probe: of each pair how alike its sentences are, or of each sentence how likely a token
    of it is, as the logarithm.
    """
    if isinstance(model, Encoder):
        return cosines(model, probe)
    sentences = sorted({*probe.first, *probe.second})
    return np.asarray(-model.log_losses(model.written([""] * len(sentences), sentences))[0])


def kept(base: NDArray[np.float64], model: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of what a model says less what the base says, and the lower end of its 95% interval; always the same."""
    differences = model - base
    drawn = np.random.default_rng(len(differences)).integers(len(differences), size=(RESAMPLES, len(differences)))
    return float(differences.mean()), float(np.quantile(differences[drawn].mean(axis=1), 0.025))


def cosines(encoder: Encoder, probe: Probe) -> NDArray[np.float64]:
    """How alike an encoder finds the sentences of each pair, -1 to 1."""
    first, second = encoder.embed(probe.first), encoder.embed(probe.second)
    return np.asarray((first.astype(np.float64) * second).sum(axis=1), dtype=np.float64)


def retained(probe: Probe, base: NDArray[np.float64], model: NDArray[np.float64]) -> tuple[float, float]:
    """The model's rank correlation less the base's, and the lower end of its 95% interval. The same each time."""
    pairs = len(probe.similarity)
    drawn = np.random.default_rng(pairs).integers(pairs, size=(RESAMPLES, pairs))
    differences = _spearman(model[drawn], probe.similarity[drawn]) - _spearman(base[drawn], probe.similarity[drawn])
    change = _spearman(model, probe.similarity) - _spearman(base, probe.similarity)
    return float(change), float(np.quantile(differences, 0.025))


def scale_adapter(model: Encoder | Generator, scale: float) -> None:
    """Let the adapter's part count `scale` times what training gave it; the adapter's settings then say so too."""
    from peft.tuners.lora import LoraLayer

    for module in model.model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)
            model.model.peft_config["default"].lora_alpha = scale * module.lora_alpha["default"]


def _spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation of the ranks along the last axis, equal values sharing the mean of theirs."""
    a, b = (rankdata(values, axis=-1) for values in (one, other))
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (a, b))
    return np.asarray((a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1)), dtype=np.float64)


def _has_headings(lines: list[list[str]]) -> bool:
    try:
        float(lines[0][2])
    except (ValueError, IndexError):
        return True
    return False
