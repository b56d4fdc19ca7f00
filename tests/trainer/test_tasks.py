"""Every task on real data: generation 0 by the contract, a challenger, both judged on later rows, and served."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from accrual.bundle import Manifest
from accrual.config import Config
from accrual.contract import Contract, load_contracts
from accrual.judged import Judged
from accrual.predictor import Predictor
from accrual.signing import load_or_make_signing_key
from accrual.training_policy import Retention
from examples import (
    argument_ranking,
    comment_emotions,
    restaurant_texts,
    text_similarity,
    venue_choices,
    venue_replies,
)
from examples.case import Case
from trainer.challenger import Champion, make_challenger
from trainer.examine import examine
from trainer.freeze import freeze_generation_0, made_with
from trainer.retention import Probe, Writing, read_probe
from trainer.select import ROW_COLUMNS, Selection
from trainer.weigh import Row

CONTRACTS = load_contracts(Path(__file__).parents[2] / "schemas" / "contracts")


class Made(NamedTuple):
    """Generation 0, its challenger with what it learned from, and what both say of later rows."""

    contract: Contract
    zero: Predictor
    one: Predictor
    learned: list[Row]
    rows: list[Row]
    inputs: list[dict[str, object]]
    before: Judged
    after: Judged


def rows_of(contract: Contract, cases: list[Case]) -> list[Row]:
    """Labeled rows, as the trainer reads them from the lake."""
    return [
        Row(f"p-{n}", contract.render(case.inputs), contract.label_of(case.outcomes[-1][1]))
        for n, case in enumerate(cases)
    ]


def make(folder: Path, contract: Contract, cases: list[Case], learn: int, keep: int, probe: Probe | None) -> Made:
    """Learn from the first rows, calibrate on the next, judge on those after them."""
    config = Config(state=str(folder))
    key = load_or_make_signing_key(config.signing_key, config.public_key)
    base = contract.training.base_model or "minilm"
    known = [case for case in cases if case.outcomes]
    rows = rows_of(contract, known)
    store, zero = config.model_store, freeze_generation_0(config.model_store, key, contract, base)
    champion = Predictor.load(store / zero, config)
    selection = Selection(
        learn=rows[:learn],
        calibrate=rows[learn : learn + keep],
        rows=pa.Table.from_pylist([{"prediction_id": row.prediction_id} for row in rows[: learn + keep]], ROW_COLUMNS),
        shift={},
        until=known[learn + keep].predicted_at,
        counts={"new": learn, "calibrate": keep, "replay": 0},
    )
    manifest = Manifest(
        stream=contract.stream,
        version=1,
        parent=champion.model,
        parent_digest=zero,
        run_id="run",
        windows=[1],
        snapshot_id=1,
        rows_new=learn + keep,
        rows_replayed=0,
        rows_digest=selection.digest,
        seed=contract.training.seed,
        base=base,
        base_digest=None,
        made_with=made_with(),
    )
    given = Champion(champion, store / zero)
    one = Predictor.load(store / make_challenger(store, key, contract, manifest, given, selection, probe, None), config)
    later = rows[learn + keep :]
    texts, labels = [row.text for row in later], [row.label for row in later]
    inputs = [case.inputs for case in known[learn + keep :]]
    return Made(
        contract, champion, one, rows[:learn], later, inputs, champion.judge(texts, labels), one.judge(texts, labels)
    )


@pytest.fixture(scope="module")
def emotions(tmp_path_factory: pytest.TempPathFactory) -> Made:
    contract = CONTRACTS["comment-emotions"]
    return make(
        tmp_path_factory.mktemp("emotions"), contract, comment_emotions.cases(contract, 1200, 3), 600, 100, None
    )


@pytest.fixture(scope="module")
def similarity(tmp_path_factory: pytest.TempPathFactory) -> Made:
    contract = CONTRACTS["text-similarity"]
    return make(tmp_path_factory.mktemp("similar"), contract, text_similarity.cases(contract, 700, 3), 300, 60, None)


@pytest.fixture(scope="module")
def ranking(tmp_path_factory: pytest.TempPathFactory) -> Made:
    contract = CONTRACTS["argument-ranking"]
    training = msgspec.structs.replace(contract.training, max_tokens=48)
    contract = msgspec.structs.replace(contract, training=training)
    return make(tmp_path_factory.mktemp("ranking"), contract, argument_ranking.cases(contract, 560, 3), 260, 60, None)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Made:
    contract = CONTRACTS["restaurant-texts"]
    lora = msgspec.structs.replace(contract.training.lora, layers=2)
    training = msgspec.structs.replace(contract.training, epochs=2, lora=lora)
    gate = msgspec.structs.replace(contract.gate, retention=Retention("writing", 0.5))
    contract = msgspec.structs.replace(contract, training=training, gate=gate)
    whole = read_probe("writing", "text")
    assert isinstance(whole, Writing)
    probe = Writing("writing", "", whole.prompts[::20], whole.completions[::20])
    return make(tmp_path_factory.mktemp("texts"), contract, restaurant_texts.cases(contract, 40, 3), 24, 4, probe)


def learning_by_heart(contract: Contract) -> Contract:
    """What few rows of noisy judgements teach of later ones is not seen in a minute; that they are learned is."""
    return msgspec.structs.replace(
        contract, training=msgspec.structs.replace(contract.training, epochs=6, learning_rate=0.004)
    )


@pytest.fixture(scope="module")
def thumbs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    contract = learning_by_heart(CONTRACTS["venue-replies"])
    return make(tmp_path_factory.mktemp("thumbs"), contract, venue_replies.cases(contract, 60, 3), 36, 8, None)


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Made:
    contract = learning_by_heart(CONTRACTS["venue-choices"])
    return make(tmp_path_factory.mktemp("choices"), contract, venue_choices.cases(contract, 40, 3), 24, 6, None)


def z(made: Made) -> float:
    """By how many standard errors the challenger's Brier score is lower, on rows that neither saw."""
    gains = made.before.brier - made.after.brier
    assert (np.abs(gains) <= 2).all()
    return float(gains.mean() / gains.std(ddof=1) * np.sqrt(len(gains)))


def test_several_labels(emotions: Made) -> None:
    assert z(emotions) > 4
    assert emotions.after.log_loss.mean() < emotions.before.log_loss.mean()
    said = emotions.one.predict(emotions.inputs[:40])
    assert {one.task for one in said} == {"multilabel"}
    for one in said:
        assert set(one.probabilities) == set(emotions.contract.output.classes)
        assert one.label == ",".join(name for name, p in one.probabilities.items() if p >= 0.5)
        assert emotions.contract.output.accepts(one.label)
    assert any(sum(one.probabilities.values()) > 1.2 or sum(one.probabilities.values()) < 0.8 for one in said)


def test_a_score(similarity: Made) -> None:
    assert z(similarity) > 4
    assert similarity.after.rank_correlation is not None and similarity.after.rank_correlation > 0.6
    assert similarity.before.rank_correlation is None, "a constant ranks nothing"
    said = similarity.one.predict(similarity.inputs[:10])
    assert [one.label for one in said] == [str(one.probabilities["score"]) for one in said]
    swapped = [{"first": row["second"], "second": row["first"]} for row in similarity.inputs[:10]]
    assert [one.label for one in similarity.one.predict(swapped)] == [one.label for one in said], (
        "likeness has no order"
    )


def test_a_ranking(ranking: Made) -> None:
    assert z(ranking) > 4
    assert ranking.after.accuracy > 0.6
    firsts = ranking.one.worth(ranking.inputs)
    swapped = [row | {"first": row["second"], "second": row["first"]} for row in ranking.inputs]
    said = np.array([one.probabilities["first"] for one in ranking.one.predict(ranking.inputs)])
    apart = firsts - ranking.one.worth(swapped)
    assert np.corrcoef(np.argsort(np.argsort(apart)), np.argsort(np.argsort(said)))[0, 1] > 0.999
    assert ranking.zero.predict(ranking.inputs[:1])[0].probabilities == {"first": 0.5, "second": 0.5}


def test_a_text(texts: Made) -> None:
    assert texts.after.log_loss.mean() < texts.before.log_loss.mean() - 0.1
    assert texts.after.brier.mean() < texts.before.brier.mean()
    assert texts.one.manifest.retention is not None and texts.one.manifest.retention > -0.5
    [said] = texts.one.predict(texts.inputs[:1])
    assert said.task == "text" and said.label and list(said.probabilities) == [said.label]
    assert texts.one.calibrator.rows == 4


@pytest.mark.parametrize("task", ["thumbs", "choices"])
def test_judgements_of_texts(task: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(task)
    assert np.unique(made.zero.probabilities([row.text for row in made.rows]), axis=0).shape == (1, 2)
    texts, labels = [row.text for row in made.learned], [row.label for row in made.learned]
    before, after = made.zero.judge(texts, labels), made.one.judge(texts, labels)
    assert after.log_loss.mean() < before.log_loss.mean() - 0.1, "what it has learned from it knows"
    assert after.auroc is not None and after.auroc > 0.8
    assert ((made.after.brier >= 0) & (made.after.brier <= 2)).all()
    [said] = made.one.predict(made.inputs[:1])
    assert said.task == "classification" and set(said.probabilities) == set(made.contract.output.classes)
    asked = {name: made.inputs[0][name] for name in ("kind", "act", "known")}
    [one], [zero] = made.one.write([asked]), made.zero.write([asked])
    assert one and zero


@pytest.mark.parametrize("task", ["emotions", "similarity", "ranking"])
def test_a_person_sees_what_changed(task: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(task)
    recorded = [msgspec.json.encode(inputs) for inputs in made.inputs]
    examined = examine(made.one, made.zero, made.contract, made.rows, recorded)
    assert examined.rows == len(made.rows)
    assert {s.kind for s in examined.slices} >= {"label", "texts like"}
    assert all(0 <= row.of_label <= 1 and (row.said or task == "emotions") for row in examined.worst)
    same = [msgspec.structs.replace(row, label=made.rows[0].label) for row in made.rows[:50]]
    assert examine(made.one, made.zero, made.contract, same, recorded[:50]).rows == 50, "with one label, too"
    assert examined.worst[0].text in {
        row.text if isinstance(row.text, str) else " | ".join(row.text) for row in made.rows
    }
