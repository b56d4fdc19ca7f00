"""A contract changes while models made by the one before are in service: each is judged as it serves, or not at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from accrual.config import Config
from accrual.contract import Contract, load_contracts
from accrual.errors import ContractError
from accrual.predictor import Predictor
from accrual.signing import load_or_make_signing_key
from tests.trainer.world import STREAM, World
from trainer import challenger
from trainer.backtest import apart
from trainer.cycle import Trainer
from trainer.evaluate import check_contract
from trainer.freeze import freeze_generation_0
from trainer.publish import Said

CONTRACTS = load_contracts(Path(__file__).parents[2] / "schemas" / "contracts")


def changed(contract: Contract, part: str, **fields: Any) -> Contract:
    return msgspec.structs.replace(contract, **{part: msgspec.structs.replace(getattr(contract, part), **fields)})


def test_each_model_reads_the_rows_by_the_template_that_it_was_made_with(world: World) -> None:
    for _ in range(2):
        world.seal()
        world.finish()
    champion = world.said()[2][-1]
    assert champion.version == 1
    contract = changed(world.contracts[STREAM], "training", template="zebra zebra zebra {text}")
    world.contracts[STREAM] = contract
    world.seal()
    world.finish()
    [judged] = [e for e in world.said()[1] if e.window == 3 and e.role == "champion"]

    served = Predictor.load(world.config.model_store / champion.bundle, world.config)
    rows = world.rows[120:180]
    said = served.predict([{"text": text} for text, _ in rows])
    p = np.array([[one.probabilities[name] for name in served.classes] for one in said])
    truth = np.array([[float(name == label) for name in served.classes] for _, label in rows])
    assert judged.brier == pytest.approx(((p - truth) ** 2).sum(1).mean(), abs=1e-4)
    by_new = served.judge([contract.render({"text": text}) for text, _ in rows], [label for _, label in rows])
    assert abs(by_new.brier.mean() - judged.brier) > 0.001, "or the template would not matter"

    [zero] = [e for e in world.said()[1] if e.window == 3 and e.role == "generation-0"]
    first = Predictor.load(world.config.model_store / world.said()[2][0].bundle, world.config)
    as_published = first.judge([text for text, _ in rows], [label for _, label in rows])
    assert zero.brier == pytest.approx(as_published.brier.mean()), "generation 0 stays the one that was published"


def test_inputs_that_were_recorded_under_another_name_are_read_by_both() -> None:
    contract = CONTRACTS["support-intents"]
    assert list(contract.inputs) == ["text"]
    renamed = msgspec.structs.replace(
        changed(contract, "training", template="{question}"),
        inputs={"question": msgspec.structs.replace(contract.inputs["text"], was=["text"])},
    )
    for raw in (
        b'{"text": "Where is it?"}',
        b'{"question": "Where is it?"}',
        b'{"text": null, "question": "Where is it?"}',
    ):
        assert renamed.render_recorded(raw) == "Where is it?"
    assert contract.render_recorded(b'{"text": "Where is it?"}') == "Where is it?"


def test_a_contract_that_reads_labels_otherwise_is_refused_and_says_what_to_do(world: World) -> None:
    world.seal()
    world.finish()
    few = world.contracts[STREAM].output.classes[:-1]
    world.contracts[STREAM] = changed(world.contracts[STREAM], "output", classes=few)
    world.seal()
    with pytest.raises(ContractError, match=r"desk@0 is of another contract: output.classes: top_up_failed removed"):
        world.trainer().next_step(STREAM)
    assert len(world.said()[0]) == 1


def test_texts_are_judged_by_tokens_so_another_base_is_another_stream() -> None:
    contract = CONTRACTS["restaurant-texts"]
    model = "restaurant-texts@3"
    check_contract(model, contract, changed(contract, "training", learning_rate=1.0))
    with pytest.raises(ContractError, match=r"training.base_model: another base has other tokens"):
        check_contract(model, contract, changed(contract, "training", base_model="another/base"))
    with pytest.raises(ContractError, match=r"output.max_new_tokens"):
        check_contract(model, contract, changed(contract, "output", max_new_tokens=7))


def test_of_labels_of_several_names_a_class_more_is_no_gain(tmp_path: Path) -> None:
    """A class that never is and that nobody expects: as a mean over the model's own classes it would be one."""
    config = Config(state=str(tmp_path))
    key = load_or_make_signing_key(config.signing_key, config.public_key)
    few, models = ["joy", "love", "anger"], []
    for classes in (few, [*few, "never"]):
        prior = dict.fromkeys(few, 0.3) | dict.fromkeys(classes[3:], 1e-6)
        contract = changed(CONTRACTS["comment-emotions"], "output", classes=classes, prior=prior)
        digest = freeze_generation_0(config.model_store, key, contract, "minilm")
        models.append(Predictor.load(config.model_store / digest, config))
    labels = ["joy", "love,joy", "", "anger"]
    alone = [model.judge(["a text"] * 4, labels).brier for model in models]
    assert (alone[0] - alone[1]).mean() > 0.05
    asked = [name for model in models for name in model.classes]
    first, second = (model.judge(["a text"] * 4, labels, asked).brier for model in models)
    assert first == pytest.approx(second, abs=1e-6)
    other = models[0].judge(["a text"], ["never"], asked).brier
    assert other == pytest.approx((3 * 2 * 0.3**2 + 2 * 1.0) / 4, abs=1e-6), "it said 0 of a class that was"


def test_generation_0_is_that_of_todays_contract_whatever_the_store_holds(world: World, tmp_path: Path) -> None:
    config, said = apart(world.config, tmp_path / "apart"), []
    for prior in ({"card_arrival": 0.7}, {"card_arrival": 0.1}):
        others = [name for name in world.contracts[STREAM].output.classes if name != "card_arrival"]
        shares = prior | dict.fromkeys(others, (1 - prior["card_arrival"]) / len(others))
        contract = changed(world.contracts[STREAM], "output", prior=shares, open=False)
        told = Said()
        Trainer(config, {STREAM: contract}, told).next_step(STREAM)
        champion = told.champion(STREAM)
        assert champion is not None
        [output] = Predictor.load(config.model_store / champion.bundle, config).predict([{"text": "any"}])
        said.append(round(output.probabilities["card_arrival"], 3))
    assert said == [0.7, 0.1]


@pytest.mark.parametrize("what", ["base", "pair", "cohort"])
def test_a_warm_start_goes_on_from_a_champion_of_the_same_base_and_kind_of_rows(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapter").mkdir()
    contract = changed(CONTRACTS["text-similarity"], "training", start="champion")
    monkeypatch.setattr(challenger, "base_digest", lambda _: "of today")
    before = SimpleNamespace(
        model="text-similarity@4",
        manifest=SimpleNamespace(base_digest="of today"),
        contract=contract,
        classes=["score"],
        weight=np.ones((1, 4), dtype=np.float32),
        bias=np.zeros(1, dtype=np.float32),
    )
    champion = challenger.Champion(cast(Predictor, before), tmp_path)
    selection = cast(Any, SimpleNamespace(shift={}))
    assert challenger.start_of(contract, "minilm", champion, selection) is not None
    if what == "base":
        before.manifest.base_digest = "of before"
    elif what == "pair":
        before.contract = changed(contract, "training", second_template=None)
    else:
        contract = changed(contract, "training", cohort="observed")
    assert challenger.start_of(contract, "minilm", champion, selection) is None
    young, other = "learned from young rows", "has another base, or another kind of rows"
    assert f"text-similarity@4 {'has ' + young if what == 'cohort' else other}" in caplog.text
