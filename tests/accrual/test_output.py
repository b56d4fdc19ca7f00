"""Tasks: what a contract may say of its output, and which outcomes are labels of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from accrual.contract import Contract, load_contract, shown
from accrual.errors import ContractError, Rejected

BASE: dict[str, Any] = {
    "stream": "texts",
    "inputs": {"first": {"type": "string"}, "second": {"type": "string"}},
    "outcome": {"values": {"said": {"type": "string"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}}},
    "label": {"field": "said"},
    "horizon": "7d",
    "training": {"template": "{first}"},
}
PAIR = {"template": "{first}", "second_template": "{second}"}
STARS = {"expression": "(stars - 1) / 4"}


def contract(folder: Path, **changed: Any) -> Contract:
    path = folder / "texts.yaml"
    path.write_text(yaml.safe_dump(BASE | changed), encoding="utf-8")
    return load_contract(path)


def test_a_score_is_a_number_between_0_and_1(tmp_path: Path) -> None:
    it = contract(tmp_path, output={"task": "score"}, label=STARS)
    assert it.output.classes == ["score"]
    assert [it.label_of({"stars": stars}) for stars in (1, 2, 5)] == ["0.0", "0.25", "1.0"]
    free = contract(tmp_path, output={"task": "score"})
    assert free.label_of({"said": "0.3"}) == "0.3"
    for text in ("1.01", "-0.1", "nan", "much", "0_1", "٠.٥", "."):
        with pytest.raises(Rejected, match=f"label '{text}' is not one of the numbers from 0 to 1"):
            free.label_of({"said": text})


def test_a_label_of_several_names_known_classes(tmp_path: Path) -> None:
    it = contract(tmp_path, output={"task": "multilabel", "classes": ["joy", "love"]})
    assert [it.label_of({"said": text}) for text in ("love,joy", "joy", "")] == ["love,joy", "joy", ""]
    with pytest.raises(Rejected, match=r"label 'joy,grief' is not one of output\.classes"):
        it.label_of({"said": "joy,grief"})
    opening = contract(tmp_path, output={"task": "multilabel", "classes": ["joy"], "open": True})
    assert opening.label_of({"said": "joy,grief"}) == "joy,grief"
    assert opening.output.known(["joy"], ["grief,joy", "", "awe"]) == ["joy", "awe", "grief"]


def test_a_ranking_reads_two_texts(tmp_path: Path) -> None:
    it = contract(tmp_path, output={"task": "ranking"}, training=PAIR)
    assert it.output.classes == ["first", "second"]
    assert it.render({"first": "a", "second": "b"}) == ("a", "b")
    assert shown(it.render({"first": "a", "second": "b"})) == "a | b"
    assert (it.pair, contract(tmp_path, output={"task": "score"}, training=PAIR).pair) == ("difference", "comparison")


def test_what_was_written_stands_behind_its_prompt(tmp_path: Path) -> None:
    written = {"template": "Name {first}", "base_model": "smollm2"}
    thumbs = contract(tmp_path, output={"task": "thumbs"}, training=written | {"completions": ["{second}"]})
    assert thumbs.output.classes == ["down", "up"]
    assert thumbs.render({"first": "a", "second": "b"}) == ("Name a", "b")
    assert thumbs.prompt({"first": "a"}) == "Name a"
    both = contract(
        tmp_path, output={"task": "preference"}, training=written | {"completions": ["{second}", "not {second}"]}
    )
    assert both.output.classes == ["first", "second"]
    assert both.render({"first": "a", "second": "b"}) == ("Name a", "b", "not b")


@pytest.mark.parametrize(
    ("changed", "field", "problem"),
    [
        ({"output": {"task": "score", "classes": ["a", "b"]}}, "output.classes", "those of a score are given"),
        ({"output": {"task": "score", "open": True}}, "output.open", "a score has no further classes"),
        ({"output": {"task": "score", "prior": {"score": 1}}}, "output.prior", "a rate between 0 and 1"),
        (
            {"output": {"task": "score"}, "on_expiry": "2"},
            "on_expiry",
            "'2' is neither `censored` nor one of the numbers from 0 to 1",
        ),
        (
            {"output": {"task": "score"}, "label": {"field": "stars", "take": "sum", "thresholds": {"1": 5}}},
            "label.take",
            "a score has none",
        ),
        ({"output": {"task": "score"}, "label": {"field": "said", "map": {"bad": "low"}}}, "label.map", "'low' is not"),
        ({"output": {"task": "ranking"}}, "training.second_template", "a ranking chooses between two texts"),
        ({"output": {"task": "ranking", "classes": ["a", "b"]}, "training": PAIR}, "output.classes", "leave it out"),
        ({"output": {"task": "multilabel", "classes": ["a,b", "c"]}}, "output.classes", "'a,b': a label of several"),
        ({"output": {"task": "multilabel"}}, "output.classes", "name at least"),
        (
            {"output": {"task": "multilabel", "classes": ["a", "b"], "prior": {"a": 0.5}}},
            "output.prior",
            "give every one of a, b a rate",
        ),
        (
            {"output": {"task": "multilabel", "classes": ["a", "b"]}, "training": PAIR},
            "training.second_template",
            "a multilabel reads one text",
        ),
        (
            {"output": {"task": "score"}, "training": {"template": "{first}", "balance": "sqrt"}},
            "training.balance",
            "needs one class a row",
        ),
        (
            {"output": {"task": "score"}, "training": {"template": "{first}", "replay_by": "label"}},
            "training.replay_by",
            "needs one class a row",
        ),
        (
            {"output": {"task": "score"}, "training": BASE["training"] | {"prefer": "rare"}},
            "training.prefer",
            "`rare` draws by the inputs in quality",
        ),
        ({"output": {"task": "ranking"}, "training": PAIR | {"second_template": "x"}}, "training.second_template", "{"),
        ({"output": {"task": "text"}}, "training.base_model", "texts need a model that writes"),
        ({"output": {"task": "thumbs"}}, "training.completions", "a row of a thumbs needs 1: each text that is judged"),
        (
            {"output": {"task": "preference"}, "training": BASE["training"] | {"completions": ["{second}"]}},
            "training.completions",
            "a row of a preference needs 2",
        ),
        (
            {"output": {"task": "score"}, "training": BASE["training"] | {"completions": ["{second}"]}},
            "training.completions",
            "a row of a score has none",
        ),
        (
            {"output": {"task": "thumbs"}, "training": BASE["training"] | {"completions": ["{third}"]}},
            "training.completions",
            "{third} is not one of inputs",
        ),
        ({"output": {"task": "thumbs", "classes": ["bad", "good"]}}, "output.classes", "those of a thumbs are given"),
        ({"output": {"task": "score"}, "training": BASE["training"] | {"beta": 0}}, "training.beta", "above 0"),
        ({"output": {"task": "text", "prior": {"a": 0.5}}}, "output.prior", "the base model as it is"),
        ({"output": {"task": "text", "max_new_tokens": 200}}, "training.max_tokens", "counts prompt and text"),
        (
            {"output": {"task": "score"}, "quality": {"bounds": [{"metric": "label_share", "most": 0.5}]}},
            "quality.bounds",
            "label_share: a score has none",
        ),
        ({"output": {"classes": ["a"]}}, "output.classes", "at least two classes"),
        ({"output": {"task": "guess"}}, "output.task", "Invalid enum value 'guess'"),
    ],
)
def test_what_makes_no_sense_is_said_with_its_field(
    tmp_path: Path, changed: dict[str, Any], field: str, problem: str
) -> None:
    with pytest.raises(ContractError) as refused:
        contract(tmp_path, **changed)
    assert field in str(refused.value)
    assert problem in str(refused.value)
