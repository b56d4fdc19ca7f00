"""The predictor: a bundle, loaded. Services and the trainer's judge use this same class, so what was judged is served.

    encoder -> mean of the states, length one; of a pair, both as one -> weight @ e + bias -> calibrator

A bundle without `weight` is a constant model: it says the same of every row, and needs neither base nor torch. Where
texts are written there is no head: a generator writes them (accrual/generator.py), and where people judge texts it says
how it expects them to be judged (accrual/reward.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from accrual.bundle import Manifest, read_classes, verify_bundle
from accrual.calibrator import Calibrator
from accrual.config import Config
from accrual.contract import Contract, Text, flattened, load_contract, shown
from accrual.errors import BundleError, ContractError
from accrual.events import Distribution
from accrual.judged import Judged, judged
from accrual.output import SEPARATOR
from accrual.reward import logits_of
from accrual.scores import truth_of

if TYPE_CHECKING:
    from accrual.encoder import Encoder
    from accrual.generator import Generator

DIGITS = 6  # of a probability on the wire: an event of 77 classes stays under 3 kB


class Predictor:
    """A model in memory. Safe to call from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        contract: Contract,
        classes: list[str],
        weight: NDArray[np.float32] | None,
        bias: NDArray[np.float32],
        calibrator: Calibrator,
        encoder: Encoder | None,
        generator: Generator | None = None,
    ) -> None:
        """For `load`. `encoder` is None exactly when `weight` is, `generator` unless the task is one that writes."""
        self.manifest = manifest
        self.contract = contract
        self.classes = classes
        self.weight = weight
        self.bias = bias
        self.calibrator = calibrator
        self._encoder = encoder
        self._generator = generator

    @classmethod
    def load(cls, folder: Path, config: Config) -> Predictor:
        """Verify a bundle with `config.public_key`, then load it over the base model that the configuration names.

        Raises BundleError when the bundle does not verify or the base is not the one it was made on, ConfigError when
        the base cannot be found.
        """
        manifest = verify_bundle(folder, config.public_key)
        contract, classes = load_contract(folder / "contract.yaml"), read_classes(folder)
        try:
            calibrator = msgspec.json.decode((folder / "calibrator.json").read_bytes(), type=Calibrator)
            head = load_file(folder / "head.safetensors")
            weight, bias = head.get("weight"), head["bias"]
        except (OSError, KeyError, msgspec.DecodeError) as exc:
            raise BundleError(f"{folder}: not a whole bundle: {exc}") from exc
        if contract.output.writes:
            generator = _generator(folder, manifest, contract, config)
            return cls(manifest, contract, classes, weight, bias, calibrator, None, generator)
        encoder = None if weight is None else _encoder(folder, manifest, contract, config)
        return cls(manifest, contract, classes, weight, bias, calibrator, encoder)

    @property
    def model(self) -> str:
        """`stream@version`."""
        return self.manifest.model

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[Distribution]:
        """One distribution for each row of inputs, probabilities rounded to `DIGITS` digits."""
        return self.answers([self.contract.render(row) for row in inputs])

    def answers(self, texts: Sequence[Text]) -> list[Distribution]:
        """The same for rows that are rendered already."""
        task = self.contract.output.task
        if self._generator is not None and task == "text":
            written = self._generator.complete([shown(text) for text in texts], self.calibrator.temperature)
            said = [(text, {text: round(probability, DIGITS)}) for text, probability in written]
        else:
            table = np.round(self.probabilities(texts), DIGITS)
            said = [(self._label_of(row), dict(zip(self.classes, row.tolist(), strict=True))) for row in table]
        kind = task if task == "multilabel" or task == "score" or task == "text" else "classification"
        return [Distribution(task=kind, label=label, probabilities=probabilities) for label, probabilities in said]

    def _label_of(self, row: NDArray[np.float64]) -> str:
        """What the probabilities [classes] of a row say: the likeliest class, those of 1/2 and above, or the score."""
        match self.contract.output.task:
            case "score":
                return str(float(row[0]))
            case "multilabel":
                return SEPARATOR.join(name for name, p in zip(self.classes, row, strict=True) if p >= 0.5)
            case _:
                return self.classes[int(row.argmax())]

    def vectors(self, texts: Sequence[Text]) -> NDArray[np.float32] | None:
        """The rows' vectors, [texts, dimensions]; None for a constant model and for one that writes."""
        return None if self._encoder is None else self._encoder.vectors(texts)

    def worth(self, inputs: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
        """Of a ranking: how much each row's first text is worth, [rows]. The greater of two is the likelier choice.

        Differences are log-odds, but for the calibration and for what being first is worth. A constant model: all 0.
        Raises ContractError for another task.
        """
        if self.contract.output.task != "ranking":
            raise ContractError(
                f"output.task is {self.contract.output.task}: only of a ranking's texts one is worth more"
            )
        if self._encoder is None or self.weight is None:
            return np.zeros(len(inputs))
        firsts = flattened([self.contract.render(row) for row in inputs])[0::2]
        return np.asarray(self._encoder.embed(firsts) @ (self.weight[0] - self.weight[1]), dtype=np.float64)

    def write(self, inputs: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a language model writes for each row: its likeliest answer to the prompt, `training.template`.

        Inputs that the prompt does not name may be missing. Raises ContractError when the model does not write.
        """
        if self._generator is None:
            raise ContractError(f"output.task is {self.contract.output.task}: such a model writes no texts")
        prompts = [self.contract.prompt(row) for row in inputs]
        return [written.text for written in self._generator.complete(prompts)]

    def judge(self, texts: Sequence[Text], labels: Sequence[str], beside: Sequence[str] = ()) -> Judged:
        """What the model says of rows, beside their labels.

        `beside`: classes of models that it is compared with. Where a label has several names, each class is a question
        of its own, so those that it lacks are asked, too: it says 0 of them.
        """
        if self._generator is not None and self.contract.output.task == "text":
            rows = self._generator.written([shown(text) for text in texts], labels)
            return self._generator.read(rows, self.calibrator.temperature).judged()
        said, classes = self.probabilities(texts), self.classes
        if self.contract.output.task == "multilabel":
            classes = [*classes, *(name for name in dict.fromkeys(beside) if name not in classes)]
            said = np.pad(said, ((0, 0), (0, len(classes) - said.shape[1])))
        return judged(said, truth_of(self.contract.output, labels, classes))

    def probabilities(self, texts: Sequence[Text]) -> NDArray[np.float64]:
        """[texts, classes], as computed; each row sums to 1, unless each class stands by itself."""
        logits: NDArray[np.floating[Any]]
        if self._generator is not None:
            logits = logits_of(self._generator, texts, self.contract.training.beta, self.bias)
        elif self._encoder is None or self.weight is None:
            logits = np.tile(self.bias, (len(texts), 1))
        else:
            logits = self._encoder.vectors(texts) @ self.weight.T + self.bias
        return self.calibrator.probabilities(logits)


def _generator(folder: Path, manifest: Manifest, contract: Contract, config: Config) -> Generator:
    from accrual.generator import Generator  # brings torch

    return Generator.load(
        _base(folder, manifest, contract, config),
        contract.training.max_tokens,
        contract.output.max_new_tokens,
        folder / "tokenizer",
        _adapter(folder),
        apart=contract.output.task != "text",
    )


def _adapter(folder: Path) -> Path | None:
    adapter = folder / "adapter"
    return adapter if adapter.is_dir() else None


def _base(folder: Path, manifest: Manifest, contract: Contract, config: Config) -> Path:
    """Where the base model is. Raises BundleError when it is not the one that the bundle was made on."""
    from accrual.encoder import base_digest, base_folder

    base = contract.training.base_model or config.models.base
    where = base_folder(base)
    if base_digest(where) != manifest.base_digest:
        raise BundleError(
            f"{folder}: made on base model '{manifest.base}'; what models.base names here ('{base}') is another"
        )
    return where


def _encoder(folder: Path, manifest: Manifest, contract: Contract, config: Config) -> Encoder:
    from accrual.encoder import Encoder  # brings torch

    return Encoder.load(
        _base(folder, manifest, contract, config),
        contract.training.max_tokens,
        folder / "tokenizer",
        _adapter(folder),
        pair=contract.pair,
    )
