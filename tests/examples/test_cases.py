"""The real data as a production service meets it: in order, seeded, and within the contract."""

import csv
import itertools
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from accrual.contract import Contract, load_contracts
from accrual.events import encode
from examples import (
    argument_ranking,
    assistant_intents,
    comment_emotions,
    credit_risk,
    support_intents,
    text_similarity,
)
from examples.case import Case

ROOT = Path(__file__).parents[2]
CONTRACTS = load_contracts(ROOT / "schemas" / "contracts")
SUPPORT, ASSISTANT, CREDIT = (CONTRACTS[name] for name in ("support-intents", "assistant-intents", "credit-risk"))
EMOTIONS, SIMILARITY, RANKING = (
    CONTRACTS[name] for name in ("comment-emotions", "text-similarity", "argument-ranking")
)


@pytest.fixture(scope="module")
def questions() -> list[Case]:
    return support_intents.cases(SUPPORT, support_intents.ROWS, seed=1)


@pytest.fixture(scope="module")
def loans() -> list[Case]:
    return credit_risk.cases(CREDIT, credit_risk.ROWS, seed=1)


def check(contract: Contract, cases: list[Case]) -> None:
    assert all(a.predicted_at <= b.predicted_at for a, b in itertools.pairwise(cases))
    for case in cases:
        contract.decode_inputs(encode(case.inputs))
        for observed_at, values in case.outcomes:
            assert observed_at >= case.predicted_at
            contract.label_of(contract.decode_values(encode(values)))


def test_questions_keep_their_contract_and_come_in_order(questions: list[Case]) -> None:
    assert len(questions) == 13_083
    check(SUPPORT, questions)
    assert timedelta(days=85) < questions[-1].predicted_at - questions[0].predicted_at < timedelta(days=91)


def test_forty_intents_at_launch_and_new_ones_keep_opening(questions: list[Case]) -> None:
    launched = set(SUPPORT.output.classes)
    seen: set[str] = set()
    new_by_thousand: list[int] = []
    for start in range(0, 13_000, 1000):
        intents = {case.outcomes[-1][1]["intent"] for case in questions[start : start + 1000] if case.outcomes}
        new_by_thousand.append(len(intents - seen - launched))
        seen |= intents
    assert len(seen) == 77
    assert new_by_thousand[0] <= 8
    assert sum(n > 0 for n in new_by_thousand) >= 6


def test_utterances_keep_their_contract_and_what_is_out_of_scope_is_a_class() -> None:
    utterances = assistant_intents.cases(ASSISTANT, assistant_intents.ROWS, seed=1)
    assert len(utterances) == 23_700
    check(ASSISTANT, utterances)
    first = {case.outcomes[-1][1]["intent"] for case in utterances[:2000] if case.outcomes}
    every = {case.outcomes[-1][1]["intent"] for case in utterances if case.outcomes}
    assert len(ASSISTANT.output.classes) == 81 and len(every) == 151
    assert "out_of_scope" in first and len(first - set(ASSISTANT.output.classes)) <= 15


def test_answers_come_hours_to_days_later_and_some_never_twice_or_corrected(questions: list[Case]) -> None:
    never = sum(not case.outcomes for case in questions)
    twice = sum(len(c.outcomes) == 2 and c.outcomes[0] == c.outcomes[1] for c in questions)
    corrected = sum(len(c.outcomes) == 2 and c.outcomes[0] != c.outcomes[1] for c in questions)
    assert 0.01 < never / len(questions) < 0.03
    assert 0.005 < twice / len(questions) < 0.02
    assert 0.005 < corrected / len(questions) < 0.02
    delays = sorted(c.outcomes[-1][0] - c.predicted_at for c in questions if c.outcomes)
    assert timedelta(hours=8) < delays[len(delays) // 2] < timedelta(hours=12)
    assert delays[-1] > timedelta(days=5)


def test_loans_keep_their_contract_and_their_real_dates(loans: list[Case]) -> None:
    assert len(loans) == 42_535
    check(CREDIT, loans)
    assert (loans[0].predicted_at.year, loans[0].predicted_at.month) == (2007, 6)
    assert (loans[-1].predicted_at.year, loans[-1].predicted_at.month) == (2011, 12)
    defaults = [case for case in loans if case.outcomes[0][1]["status"] == "Charged Off"]
    assert len(defaults) == 6431
    assert min(case.outcomes[0][0] - case.predicted_at for case in defaults) > timedelta(days=90)


def test_comments_hold_any_of_the_emotions_that_the_contract_names() -> None:
    comments = comment_emotions.cases(EMOTIONS, comment_emotions.ROWS, seed=1)
    assert len(comments) == 12_000
    check(EMOTIONS, comments)
    sets = [case.outcomes[-1][1]["emotions"].split(",") for case in comments if case.outcomes]
    assert {emotion for held in sets for emotion in held} == set(EMOTIONS.output.classes)
    assert 0.1 < sum(len(held) > 1 for held in sets) / len(sets) < 0.2


def test_pairs_are_rated_on_the_whole_scale_and_are_not_those_of_the_retention_probe() -> None:
    pairs = text_similarity.cases(SIMILARITY, text_similarity.ROWS, seed=1)
    assert len(pairs) == 2_786
    check(SIMILARITY, pairs)
    ratings = [case.outcomes[-1][1]["similarity"] for case in pairs if case.outcomes]
    assert (min(ratings), max(ratings)) == (0.0, 5.0) and 2.4 < sum(ratings) / len(ratings) < 2.8
    with (ROOT / "trainer" / "probes" / "stsb.csv").open(encoding="utf-8", newline="") as file:
        probed = {sentence for row in csv.reader(file) for sentence in row[:2]}
    assert not probed & {case.inputs[side] for case in pairs for side in ("first", "second")}


def test_the_convincing_argument_stands_on_either_side() -> None:
    pairs = argument_ranking.cases(RANKING, argument_ranking.ROWS, seed=1)
    assert len(pairs) == 8_198
    check(RANKING, pairs)
    chosen = Counter(case.outcomes[-1][1]["chosen"] for case in pairs if case.outcomes)
    assert set(chosen) == {"first", "second"} and abs(chosen["first"] / chosen.total() - 0.5) < 0.02
    assert all(case.inputs["first"] != case.inputs["second"] for case in pairs)


@pytest.mark.parametrize(
    ("made", "contract"),
    [
        (support_intents, SUPPORT),
        (assistant_intents, ASSISTANT),
        (credit_risk, CREDIT),
        (comment_emotions, EMOTIONS),
        (text_similarity, SIMILARITY),
        (argument_ranking, RANKING),
    ],
)
def test_the_seed_decides_and_fewer_rows_are_a_sample(made: object, contract: Contract) -> None:
    cases = getattr(made, "cases")  # noqa: B009 - six modules, one function
    assert cases(contract, 500, seed=3) == cases(contract, 500, seed=3)
    assert cases(contract, 500, seed=3) != cases(contract, 500, seed=4)
    assert len(cases(contract, 500, seed=3)) == 500
