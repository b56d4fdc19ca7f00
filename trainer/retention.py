"""Retention: what the base model could do, its adapted copy must still do.

Fine-tuning on one task moves a model away from what it knew. So before it is frozen, a challenger is asked a **probe**,
and what it says is compared with what the bare base says, which is generation 0's: so small losses do not add up from
one generation to the next.

    of an encoder     how alike two sentences are, of pairs of which people have said it. What counts is Spearman's
                      correlation (1904) of the cosines with these
    of a generator    how likely it finds each token of texts, and of the answers to instructions. What counts is the
                      mean of the logarithms over each of the two: that of the perplexity with the sign turned

The probe is a sample, hence a bound: the lower end of the 95% interval of each difference, by a bootstrap that draws
the same lines for both models (Efron 1979), must not be below `-gate.retention.most_loss`.

Where it is, there are levers, the cheapest first. An adapter adds its part to the base's weights; multiplied with less
than 1 it keeps more of the base and less of the task (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models",
CVPR, arXiv:2109.01903). The largest of `SCALES` that passes is taken. Where none does, the model is trained again with
one of `LEVERS` more, and again scaled if need be.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from accrual.encoder import Encoder
from accrual.errors import ContractError
from accrual.generator import Generator
from accrual.output import WRITES, Task
from accrual.training_policy import Training

log = logging.getLogger(__name__)

SCALES = (1.0, 0.7, 0.5, 0.35)
RESAMPLES = 500
FEWEST = 50
DISTILL = 10.0
_PROBES = Path(__file__).parent / "probes"
_PAIRS = {"stsb": _PROBES / "stsb.csv"}
_TEXTS = {"writing": _PROBES / "writing.csv"}


def _distilling(training: Training) -> Training:
    return msgspec.structs.replace(training, distill=training.distill or DISTILL)


def _fewer_layers(training: Training) -> Training:
    lora = msgspec.structs.replace(training.lora, layers=max(1, training.lora.layers - 1))
    return msgspec.structs.replace(training, lora=lora)


def _lower_rank(training: Training) -> Training:
    """With `alpha` as well: what an adapter's product is multiplied by stays."""
    lora = msgspec.structs.replace(
        training.lora, rank=max(1, training.lora.rank // 2), alpha=max(1, training.lora.alpha // 2)
    )
    return msgspec.structs.replace(training, lora=lora)


LEVERS: Mapping[str, Callable[[Training], Training]] = {
    "distillation": _distilling,
    "a layer less": _fewer_layers,
    "half the rank": _lower_rank,
}


class Likeness(msgspec.Struct, frozen=True):
    """A probe of encoders: pairs of sentences, and how alike people find them. `digest`: of its file, SHA-256."""

    name: str
    digest: str
    first: list[str]
    second: list[str]
    similarity: NDArray[np.float64]


class Writing(msgspec.Struct, frozen=True):
    """A probe of generators: instructions and their answers, and texts, which have an empty prompt. `digest`: of its
    file, SHA-256.
    """

    name: str
    digest: str
    prompts: list[str]
    completions: list[str]


Probe = Likeness | Writing


class Kept(NamedTuple):
    """What an adapter at `scale` changed of the base's abilities, in the one that suffers most: `low` is the lower end
    of the change's 95% interval.
    """

    scale: float
    what: str
    change: float
    low: float


def read_probe(name: str, task: Task) -> Probe:
    """A named probe, or a CSV file, with or without a line of headings: of sentence, sentence, similarity or, where the
    model writes, of prompt, completion.

    Raises ContractError when it cannot be read or is too small to say anything.
    """
    if task in WRITES:
        return _texts(name, *_lines(name, _TEXTS, "prompt,completion", 2))
    digest, lines = _lines(name, _PAIRS, "sentence,sentence,similarity", 3)
    try:
        rows = [(first, second, float(similarity)) for first, second, similarity in lines[_has_headings(lines) :]]
    except ValueError as exc:
        raise ContractError(f"gate.retention.probe: {name}: a similarity is no number: {exc}") from exc
    if len(rows) < FEWEST:
        raise ContractError(f"gate.retention.probe: {name} has {len(rows)} pairs; give at least {FEWEST}")
    first, second, similarity = zip(*rows, strict=True)
    return Likeness(name, digest, list(first), list(second), np.array(similarity))


def _texts(name: str, digest: str, lines: list[list[str]]) -> Writing:
    rows = lines[1:] if lines[:1] == [["prompt", "completion"]] else lines
    asked = sum(bool(prompt) for prompt, _ in rows)
    if any(0 < count < FEWEST for count in (asked, len(rows) - asked)) or not rows:
        raise ContractError(
            f"gate.retention.probe: {name} has {len(rows) - asked} texts and {asked} instructions: give at least"
            f" {FEWEST} of a kind, or none"
        )
    return Writing(name, digest, [prompt for prompt, _ in rows], [completion for _, completion in rows])


def _lines(name: str, named: Mapping[str, Path], columns: str, count: int) -> tuple[str, list[list[str]]]:
    """The SHA-256 of a probe's file, and its lines."""
    try:
        content = named.get(name, Path(name)).read_bytes()
        lines = list(csv.reader(io.StringIO(content.decode(), newline="")))
    except OSError as exc:
        of = "models that write" if named is _TEXTS else "models that do not write"
        raise ContractError(
            f"gate.retention.probe: '{name}' is not {', '.join(named)}, the probe of {of}, and as a file it cannot be"
            f" read: {exc.strerror}"
        ) from exc
    except (ValueError, csv.Error) as exc:
        raise ContractError(f"gate.retention.probe: {name} is no CSV file: {exc}") from exc
    if any(len(line) != count for line in lines):
        raise ContractError(f"gate.retention.probe: {name}: a line is not `{columns}`")
    return hashlib.sha256(content).hexdigest(), lines


def levered(training: Training, levers: Sequence[str]) -> Training:
    """What a training is with some of `LEVERS`."""
    for lever in levers:
        training = LEVERS[lever](training)
    return training


def attempts(training: Training) -> Iterator[list[str]]:
    """The levers of each training that is tried, cheapest first: none, then one more each time. One that has nothing to
    change is left out.
    """
    levers: list[str] = []
    yield levers
    for lever in LEVERS:
        if levered(training, [*levers, lever]) != levered(training, levers):
            levers = [*levers, lever]
            yield levers


def keep_abilities(model: Encoder | Generator, before: NDArray[np.float64], probe: Probe, most_loss: float) -> Kept:
    """Leave the model's adapter at the largest scale that keeps the base's abilities, or at the smallest if none does
    (then `low` is below `-most_loss`). `before`: what the base says of the probe.
    """
    for scale in _scales_of(model):
        scale_adapter(model, scale)
        worst = min((Kept(scale, *one) for one in _changes(probe, before, ability(model, probe))), key=lambda k: k.low)
        log.info("%s: %s %+.4f (at least %+.4f) with the adapter at %g", probe.name, *worst[1:], scale)
        if worst.low >= -most_loss:
            break
    return worst


def _scales_of(model: Encoder | Generator) -> Sequence[float]:
    """Whole modules that learned, and directions apart from sizes, are not halved by halving a product of matrices."""
    settings = model.model.peft_config["default"]
    return SCALES[:1] if settings.modules_to_save or settings.use_dora else SCALES


def ability(model: Encoder | Generator, probe: Probe) -> NDArray[np.float64]:
    """What a model says of each line of the probe: how alike the sentences are, or the mean logarithm of how likely a
    token of the completion is.
    """
    if isinstance(model, Encoder) and isinstance(probe, Likeness):
        return cosines(model, probe)
    if isinstance(model, Generator) and isinstance(probe, Writing):
        return np.asarray(-model.log_losses(model.written(probe.prompts, probe.completions))[0])
    raise TypeError(f"{type(probe).__name__} is no probe of a {type(model).__name__}")


def _changes(probe: Probe, base: NDArray[np.float64], model: NDArray[np.float64]) -> Iterator[tuple[str, float, float]]:
    """What is measured, its change, and the lower end of the change's 95% interval."""
    if isinstance(probe, Likeness):
        yield "correlation", *retained(probe, base, model)
        return
    asked = np.array([bool(prompt) for prompt in probe.prompts])
    for what, lines in (("text", ~asked), ("answers to instructions", asked)):
        if lines.any():
            yield f"log-likelihood of {what}", *kept(base[lines], model[lines])


def kept(base: NDArray[np.float64], model: NDArray[np.float64]) -> tuple[float, float]:
    """The mean of what a model says less what the base says, and the lower end of its 95% interval; always the same."""
    differences = model - base
    drawn = np.random.default_rng(len(differences)).integers(len(differences), size=(RESAMPLES, len(differences)))
    return float(differences.mean()), float(np.quantile(differences[drawn].mean(axis=1), 0.025))


def cosines(encoder: Encoder, probe: Likeness) -> NDArray[np.float64]:
    """How alike an encoder finds the sentences of each pair, -1 to 1."""
    first, second = encoder.embed(probe.first), encoder.embed(probe.second)
    return np.asarray((first.astype(np.float64) * second).sum(axis=1), dtype=np.float64)


def retained(probe: Likeness, base: NDArray[np.float64], model: NDArray[np.float64]) -> tuple[float, float]:
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
