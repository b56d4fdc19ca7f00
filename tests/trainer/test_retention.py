"""Retention: what is lost is measured on real sentences, and a smaller adapter wins it back, in the bundle too."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from accrual.contract import Lora
from accrual.encoder import Encoder, base_folder
from accrual.errors import ContractError, TrainingFailed
from trainer.adapter import adapt
from trainer.freeze import _write_adapter
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


@pytest.fixture(scope="module")
def base() -> Encoder:
    return Encoder.load(base_folder("minilm"), TOKENS)


@pytest.fixture(scope="module")
def probe() -> Likeness:
    """Every fifth pair of the one that ships."""
    whole = read_probe("stsb", "classification")
    assert isinstance(whole, Likeness)
    return Likeness("stsb", whole.first[::5], whole.second[::5], whole.similarity[::5])


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
    probe = Likeness("p", [""] * 400, [""] * 400, truth)
    change, low = retained(probe, base, model)
    assert change == pytest.approx(spearmanr(model, truth).statistic - spearmanr(base, truth).statistic)
    assert low < change < 0
    fewer = Likeness("p", [""] * 60, [""] * 60, truth[:60])
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

    _write_adapter(tmp_path / "adapter", bent, "minilm")
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
        (None, "none of stsb, and as a file it cannot be read"),
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
