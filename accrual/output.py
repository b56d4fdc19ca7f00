"""What a model says, by the contract's task, and which texts are labels of it.

    classification   one of the classes: probabilities that sum to 1
    ranking          which of the row's two texts is chosen: a classification with the classes `first` and `second`
    multilabel       any of the classes, each with a probability of its own; a label names them, joined by commas
    score            a number in [0, 1], as if it were the probability of the one class `score`; a label is a number
    text             what a language model writes; any text is a label
    thumbs           how a text that a language model wrote was taken: a classification with the classes `down` and `up`
    preference       which of two texts that were written is preferred: one with the classes `first` and `second`

Figures of all of them are in accrual/scores.py, those of texts in accrual/generator.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

Task = Literal["classification", "ranking", "multilabel", "score", "text", "thumbs", "preference"]

WRITES = ("text", "thumbs", "preference")
"""The tasks of a language model, which writes texts."""
SEPARATOR = ","  # between the names in a label of several
COMPLETIONS = {"thumbs": 1, "preference": 2}
"""How many texts a row holds beside its prompt."""
_NUMBER = re.compile(r"[-+.0-9eE]+")


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model says of a row: `task`, and a probability for each of `classes`.

    `classes`: a score has one, `score`; a ranking and a preference two, `first` and `second`; thumbs `down` and `up`:
    then it may be left out.
    `open`: labels outside `classes` may turn up, and become classes of later generations.
    `max_new_tokens`: of a text that is written, how long it may be.
    `prior`: what generation 0 says of every row: shares of the classes or, where each stands by itself, its own rate.
    """

    task: Task = "classification"
    classes: list[str] = []
    open: bool = False
    max_new_tokens: int = 64
    prior: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.classes:
            msgspec.structs.force_setattr(self, "classes", _GIVEN.get(self.task, []))

    @property
    def each(self) -> bool:
        """Whether every class has a probability of its own: they need not sum to 1."""
        return self.task in ("multilabel", "score")

    @property
    def one_of_classes(self) -> bool:
        """Whether a label is one of some classes."""
        return self.task in ("classification", "ranking", "thumbs", "preference")

    @property
    def writes(self) -> bool:
        """Whether the model is a language model, which writes texts."""
        return self.task in WRITES

    @property
    def unmeasured(self) -> set[str]:
        """Metrics of windows (docs/quality.md) that make no sense of it."""
        if self.one_of_classes:
            return set()
        return {"label_errors"} if self.task == "multilabel" else {"label_errors", "label_share"}

    def accepts(self, label: str) -> bool:
        """Whether a text may be a label."""
        if self.task == "score":
            return is_score(label)
        return self.open or self.task == "text" or all(name in self.classes for name in self.names_in(label))

    @property
    def refusal(self) -> str:
        """What is wrong with a text that is no label."""
        if self.task == "score":
            return f"is not one of {self.wanted}"
        return f"is not one of {self.wanted}; add it there or set output.open: true"

    @property
    def wanted(self) -> str:
        """What a label may be."""
        return "the numbers from 0 to 1" if self.task == "score" else "output.classes"

    def names_in(self, label: str) -> list[str]:
        """The classes that a label names."""
        if self.task == "multilabel":
            return [name for name in label.split(SEPARATOR) if name]
        return [label]

    def known(self, classes: Sequence[str], labels: Sequence[str]) -> list[str]:
        """`classes`, and behind them in order those that labels name besides."""
        if self.task in ("score", "text"):
            return list(classes)
        return [*classes, *sorted({name for label in set(labels) for name in self.names_in(label)} - set(classes))]


_SIDES = ["first", "second"]
_GIVEN = {"score": ["score"], "ranking": _SIDES, "text": [], "thumbs": ["down", "up"], "preference": _SIDES}


def is_score(text: str) -> bool:
    """Whether a text is a number in [0, 1], to Python and to SQL."""
    try:
        return _NUMBER.fullmatch(text) is not None and 0.0 <= float(text) <= 1.0
    except ValueError:
        return False


def output_mistakes(output: Output) -> list[tuple[str, str]]:
    """What types cannot check, as (contract field, problem and fix)."""
    task, classes = output.task, output.classes
    found: list[tuple[str, str]] = []
    if task in _GIVEN and classes != _GIVEN[task]:
        found.append(("output.classes", f"those of a {task} are given: leave it out"))
    elif task not in _GIVEN and (len(set(classes)) < len(classes) or len(classes) < (1 if output.each else 2)):
        found.append(("output.classes", "name at least two classes, each once"))
    if task == "multilabel" and (split := [name for name in classes if output.names_in(name) != [name]]):
        found.append(("output.classes", f"'{split[0]}': a label of several joins names by '{SEPARATOR}'"))
    if output.open and task in _GIVEN:
        found.append(("output.open", f"a {task} has no further classes: leave it out"))
    if output.max_new_tokens < 2:
        found.append(("output.max_new_tokens", "must be at least 2: the last one ends the text"))
    if task == "text" and output.prior is not None:
        found.append(("output.prior", "a text has none: generation 0 is the base model as it is"))
    elif output.prior is not None:
        found += _prior_mistakes(output.prior, output)
    return found


def _prior_mistakes(prior: Mapping[str, float], output: Output) -> list[tuple[str, str]]:
    if output.each:
        if set(prior) != set(output.classes) or not all(0 < rate < 1 for rate in prior.values()):
            return [("output.prior", f"give every one of {', '.join(output.classes)} a rate between 0 and 1")]
    elif set(prior) != set(output.classes) or abs(sum(prior.values()) - 1) > 1e-6 or min(prior.values()) <= 0:
        return [("output.prior", "give every class a positive share; shares sum to 1")]
    return []
