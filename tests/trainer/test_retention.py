"""Retention: what is lost is measured on real sentences, and a smaller adapter wins it back, in the bundle too."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from accrual.bundle import Manifest
from accrual.calibrator import Calibrator
from accrual.contract import load_contracts
from accrual.encoder import Encoder, base_folder
from accrual.errors import ContractError, TrainingFailed
from accrual.generator import Generator
from accrual.output import Output
from accrual.training_policy import Lora, Training
from trainer.adapter import adapt
from trainer.challenger import Recipe, train, train_and_keep
from trainer.finetune import Tuned
from trainer.freeze import write_adapter
from trainer.model_card import model_card
from trainer.retention import (
    SCALES,
    Likeness,
    Writing,
    ability,
    attempts,
    cosines,
    keep_abilities,
    levered,
    read_probe,
    retained,
    scale_adapter,
)

TOKENS = 32
FACTS = Manifest(
    stream="support-intents",
    version=1,
    parent="support-intents@0",
    parent_digest="0" * 64,
    run_id="run",
    windows=[1],
    snapshot_id=1,
    rows_new=10,
    rows_replayed=0,
    rows_digest="",
    seed=1,
    base="minilm",
    base_digest="0" * 64,
    made_with={},
)
BANKING = Path(__file__).parents[2] / "examples" / "data" / "banking77" / "train.csv"


@pytest.fixture(scope="module")
def base() -> Encoder:
    return Encoder.load(base_folder("minilm"), TOKENS)


@pytest.fixture(scope="module")
def probe() -> Likeness:
    """Every fifth pair of the one that ships."""
    whole = read_probe("stsb", "classification")
    assert isinstance(whole, Likeness)
    return Likeness("stsb", "", whole.first[::5], whole.second[::5], whole.similarity[::5])


@pytest.fixture
def bent() -> Iterator[Encoder]:
    """The base with an adapter that pulls every sentence the same way: the stronger, the less they differ."""
    encoder = Encoder.load(base_folder("minilm"), TOKENS)
    adapt(encoder, Lora(rank=4, alpha=8, layers=1))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weights in encoder.model.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.4)
    yield encoder


def test_the_probe_that_ships_is_one_that_the_base_does_well_on(base: Encoder, probe: Likeness) -> None:
    whole = read_probe("stsb", "classification")
    assert isinstance(whole, Likeness)
    assert (len(whole.first), whole.similarity.min(), whole.similarity.max()) == (625, 0.0, 5.0)
    said = cosines(base, probe)
    assert spearmanr(said, probe.similarity).statistic > 0.75
    assert retained(probe, said, said) == (0.0, 0.0)


def test_the_change_is_spearmans_and_its_bound_holds_what_pairs_leave_open() -> None:
    rng = np.random.default_rng(1)
    truth = rng.uniform(0, 5, 400).round(1)
    base, model = truth + rng.normal(0, 1.0, 400), truth + rng.normal(0, 1.3, 400)
    probe = Likeness("p", "", [""] * 400, [""] * 400, truth)
    change, low = retained(probe, base, model)
    assert change == pytest.approx(spearmanr(model, truth).statistic - spearmanr(base, truth).statistic)
    assert low < change < 0
    fewer = Likeness("p", "", [""] * 60, [""] * 60, truth[:60])
    change_of_few, low_of_few = retained(fewer, base[:60], model[:60])
    assert change_of_few - low_of_few > change - low, "fewer pairs leave more open"
    assert retained(probe, base, model) == (change, low), "the same each time"


def test_an_adapter_that_loses_nothing_stays_whole(base: Encoder, probe: Likeness) -> None:
    fresh = Encoder.load(base_folder("minilm"), TOKENS)
    adapt(fresh, Lora(layers=1))  # a new adapter changes nothing
    assert keep_abilities(fresh, ability(base, probe), probe, most_loss=0.001) == (1.0, "correlation", 0.0, 0.0)


def test_what_a_whole_adapter_loses_a_smaller_one_keeps_and_the_bundle_has_it(
    base: Encoder, probe: Likeness, bent: Encoder, tmp_path: Path
) -> None:
    before = cosines(base, probe)
    whole, _ = retained(probe, before, cosines(bent, probe))
    scale, _, change, low = keep_abilities(bent, before, probe, most_loss=0.05)
    assert scale in SCALES[1:]
    assert whole < -0.05 <= low < change

    write_adapter(tmp_path / "adapter", bent, "minilm")
    settings = msgspec.json.decode((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert settings["lora_alpha"] == pytest.approx(8 * scale)
    served = Encoder.load(base_folder("minilm"), TOKENS, adapter=tmp_path / "adapter")
    assert served.embed(probe.first[:8]) == pytest.approx(bent.embed(probe.first[:8]), abs=1e-5)

    assert retained(probe, before, cosines(served, probe))[1] >= -0.05
    scale_adapter(bent, SCALES[SCALES.index(scale) - 1])
    assert retained(probe, before, cosines(bent, probe))[1] < -0.05, "it is the largest that does"


def test_where_no_scale_keeps_them_the_smallest_is_left_and_its_bound_says_so(
    base: Encoder, probe: Likeness, bent: Encoder
) -> None:
    left = keep_abilities(bent, cosines(base, probe), probe, most_loss=0.0001)
    assert (left.scale, left.low < -0.0001) == (SCALES[-1], True)


@pytest.mark.parametrize("options", [{"dora": True}, {"modules_to_save": ["output.LayerNorm"]}])
def test_what_a_scale_does_not_halve_is_not_scaled(probe: Likeness, options: dict[str, Any]) -> None:
    fresh = Encoder.load(base_folder("minilm"), TOKENS)
    adapt(fresh, Lora(layers=1, **options))
    kept = keep_abilities(fresh, probe.similarity, probe, most_loss=0.001)  # as if the base knew all
    assert kept.low < -0.001
    assert kept.scale == 1.0


def test_a_probe_of_ones_own_may_have_headings(tmp_path: Path) -> None:
    lines = [f'"one, {n}",two,{n / 10}' for n in range(60)]
    for headings in ([], ["sentence1,sentence2,similarity"]):
        (tmp_path / "own.csv").write_text("\n".join([*headings, *lines]))
        own = read_probe(str(tmp_path / "own.csv"), "score")
        assert isinstance(own, Likeness)
        assert (own.first[0], own.second[0], own.similarity[:2].tolist()) == ("one, 0", "two", [0.0, 0.1])
        assert len(own.first) == 60


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not stsb, the probe of models that do not write, and as a file"),
        ("a,b,1\n" * 49, "49 pairs; give at least 50"),
        ("a,b,1\n" * 60 + "a,b,much\n", "a similarity is no number"),
        ("a,b,1\n" * 60 + "a,b\n", "a line is not"),
        ("", "0 pairs"),
    ],
)
def test_a_probe_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "own.csv").write_text(content)
    with pytest.raises(ContractError, match=rf"gate\.retention\.probe.*{problem}"):
        read_probe(str(tmp_path / "own.csv"), "score")


@pytest.fixture(scope="module")
def hard() -> Recipe:
    """A training on four intents of twenty rows each, at a rate that harms the base."""
    names = ["card_arrival", "lost_or_stolen_card", "exchange_rate", "pin_blocked"]
    with BANKING.open(encoding="utf-8", newline="") as file:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    chosen = [
        row
        for several in zip(*([r for r in rows if r[1] == name][:20] for name in names), strict=True)
        for row in several
    ]
    training = Training("{text}", epochs=3, learning_rate=0.02, max_tokens=TOKENS, lora=Lora(rank=4, alpha=8, layers=2))
    return Recipe(
        base="minilm",
        training=training,
        output=Output(classes=names),
        pair=None,
        texts=[text for text, _ in chosen],
        labels=[label for _, label in chosen],
        weights=[1.0] * len(chosen),
        classes=names,
        seed=1,
        start=None,
        checkpoint=None,
        sharded=False,
    )


def test_a_distilled_model_answers_sentences_it_has_not_seen_more_like_the_base(
    base: Encoder, probe: Likeness, hard: Recipe
) -> None:
    def likeness(training: Training) -> float:
        tuned = train(msgspec.structs.replace(hard, training=training))
        assert isinstance(tuned, Tuned)
        right = np.array(tuned.classes)[tuned.logits(hard.texts).argmax(1)] == hard.labels
        assert right.mean() > 0.8, "it learns the task all the same"
        return float((tuned.model.embed(probe.first) * base.embed(probe.first)).sum(1).mean())

    without, with_it = likeness(hard.training), likeness(levered(hard.training, ["distillation"]))
    assert 1 - with_it < 0.7 * (1 - without)


def test_sentences_of_general_text_are_in_no_probe() -> None:
    pairs, texts = read_probe("stsb", "classification"), read_probe("writing", "text")
    assert isinstance(pairs, Likeness) and isinstance(texts, Writing)
    general = (BANKING.parents[3] / "trainer" / "probes" / "general.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(general)) == len(general) == 396
    assert not {*general} & {*pairs.first, *pairs.second, *texts.completions}


def test_levers_come_one_more_at_a_time_and_only_where_there_is_something_to_change() -> None:
    training = Training("{text}", lora=Lora(rank=8, alpha=16, layers=3))
    tried = [levered(training, levers) for levers in attempts(training)]
    assert [(one.distill, one.lora.layers, one.lora.rank, one.lora.alpha) for one in tried] == [
        (0.0, 3, 8, 16),
        (10.0, 3, 8, 16),
        (10.0, 2, 8, 16),
        (10.0, 2, 4, 8),
    ]
    least = Training("{text}", distill=3.0, lora=Lora(rank=1, alpha=1, layers=1))
    assert list(attempts(least)) == [[]]


def test_the_model_card_tells_of_the_adapter_as_it_was_trained() -> None:
    contract = load_contracts(BANKING.parents[3] / "schemas" / "contracts")["support-intents"]
    manifest = msgspec.structs.replace(FACTS, levers=["distillation", "a layer less"], retention=-0.01)
    card = model_card(contract, manifest, contract.output.classes, Calibrator())
    assert contract.training.lora.layers == 2 and "on the top 1 layers" in card
    assert "- Retention: -0.0100 on the probe against the base, by distillation and a layer less\n" in card


def test_the_cheapest_lever_that_keeps_the_base_is_taken_each_with_a_checkpoint_of_its_own(
    probe: Likeness, hard: Recipe, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(TrainingFailed, match="train less") as failed:
        train_and_keep(msgspec.structs.replace(hard, checkpoint=checkpoint), probe, most_loss=1e-6)
    lost = re.findall(r"down to (-\S+) at 0\.35(?: by ([a-z ]+))?", str(failed.value))
    assert [by for _, by in lost] == [
        "",
        "distillation",
        "distillation and a layer less",
        "distillation and a layer less and half the rank",
    ]
    bounds = [float(low) for low, _ in lost]
    assert bounds == sorted(bounds), "each keeps more than the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"run-{n}.safetensors" for n in range(4)]

    # Its trainings are through: it goes on from their checkpoints, and stops at the first that keeps enough.
    between = -(bounds[0] + bounds[1]) / 2
    _, kept = train_and_keep(msgspec.structs.replace(hard, checkpoint=checkpoint), probe, between)
    assert kept["levers"] == ["distillation"]
    assert kept["adapter_scale"] in SCALES


@pytest.fixture
def generator() -> Generator:
    return Generator.load(base_folder("smollm2"), 128, 32)


def test_a_text_without_a_prompt_follows_a_token_where_there_is_no_chat_template(generator: Generator) -> None:
    generator.tokenizer.chat_template = None
    [written] = generator.written([""], ["A man is playing a guitar."])
    assert (written.start, written.tokens[0]) == (1, generator.tokenizer.eos_token_id)


def test_of_two_kinds_both_must_hold(generator: Generator) -> None:
    """The one that suffers more decides: answers to instructions can be lost while text is as likely as before."""
    whole = read_probe("writing", "text")
    assert isinstance(whole, Writing)
    assert (sum(map(bool, whole.prompts)), len(whole.prompts)) == (59, 119)
    few = Writing(
        "few", "", [*whole.prompts[:3], *whole.prompts[-3:]], [*whole.completions[:3], *whole.completions[-3:]]
    )
    adapt(generator, Lora(rank=2, alpha=4, layers=1))
    before = ability(generator, few)
    assert keep_abilities(generator, before, few, most_loss=0.001).scale == 1.0
    higher = before + np.array([-1.0, -1.0, -1.0, 0.5, 0.5, 0.5])
    kept = keep_abilities(generator, higher, few, most_loss=0.001)
    assert (kept.what, kept.change) == ("log-likelihood of answers to instructions", pytest.approx(-0.5, abs=1e-6))
    kept = keep_abilities(generator, -higher + 2 * before, few, most_loss=0.001)
    assert (kept.what, kept.change) == ("log-likelihood of text", pytest.approx(-1.0, abs=1e-6))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("prompt,completion\n" + "do,done\n" * 60 + ",text\n" * 49, "49 texts and 60 instructions: give at least 50"),
        ("", "0 texts and 0 instructions"),
        ("do,done,much\n" * 60, "a line is not `prompt,completion`"),
    ],
)
def test_a_probe_of_generators_that_cannot_be_used_is_named(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "own.csv").write_text(content)
    with pytest.raises(ContractError, match=problem):
        read_probe(str(tmp_path / "own.csv"), "text")
    with pytest.raises(ContractError, match="'stsb' is not writing, the probe of models that write"):
        read_probe("stsb", "text")
