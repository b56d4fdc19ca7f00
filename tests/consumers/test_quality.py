"""Rules quarantine the rows that break them, bounds hold windows back, and both are right about what they measure."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrual.config import Config
from accrual.contract import Contract, load_contract
from accrual.errors import ContractError
from accrual.events import GroundTruth, Outcome, Prediction, encode
from accrual.lake import WritableLake, open_lake_for_writing
from accrual.lake_tables import TABLES
from accrual.quality_rules import Rule
from consumers.quality import CANARIES, SUSPECTED, Inspection, inspect
from consumers.rule_sql import canaries, is_broken
from consumers.windows import Sealer, next_window, watermark_of
from tests.consumers.conftest import START, STREAM, World
from tests.consumers.conftest import settings as settings_of
from trainer.select import rows_of, sealed_windows, select, unfit

CONTRACT = """
stream: tickets
inputs:
  text: {type: string}
  channel: {type: string, optional: true}
  amount: {type: number, optional: true}
output: {classes: [low, high]}
outcome: {values: {urgency: {type: string}}}
label: {field: urgency}
horizon: 1d
on_expiry: low
disorder: 1h
training: {template: '{text}', window_rows: 50}
quality:
  slices: [channel]
  rules:
    - {name: text_length, field: text, length: [3, 200]}
    - {name: no_personal_data, field: text, free_of: [email, phone, iban, card, ip]}
    - {name: known_channel, field: channel, one_of: [mail, chat]}
    - {name: amount_range, field: amount, range: [0, 1000]}
    - {name: lower_case, field: channel, matches: '[a-z]+'}
    - {name: known_urgency, field: values.urgency, one_of: [low, high]}
    - {name: polite, field: text, matches: '.*thank.*', warn: true}
    - {name: chat_is_small, check: "channel != 'chat' or amount < 500 or amount is None"}
  bounds: {BOUNDS}
"""
WORDS = [
    "the",
    "card",
    "was",
    "not",
    "sent",
    "to",
    "my",
    "new",
    "address",
    "after",
    "I",
    "moved",
    "house",
    "last",
    "week",
    "and",
    "nobody",
    "answers",
    "the",
    "phone",
]


def contract_with(config: Config, bounds: str = "{}") -> Contract:
    path = Path(config.contracts) / "tickets.yaml"
    path.write_text(CONTRACT.replace("{BOUNDS}", bounds))
    return load_contract(path)


@pytest.fixture
def world(config: Config) -> World:
    contract_with(config)
    return World(config)


class Desk:
    """Sends labeled predictions with given inputs, labels and probabilities; one a minute."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.minute = 0
        self.chance = random.Random(3)

    def send(self, inputs: dict[str, Any], label: str = "low", high: float = 0.2, said: str = "low") -> str:
        p = Prediction(
            prediction_id=f"p-{self.minute:06d}",
            stream=STREAM,
            model=f"{STREAM}@0",
            predicted_at=START + timedelta(minutes=self.minute),
            inputs=msgspec.Raw(encode(inputs)),
            output=msgspec.Raw(encode({"label": said, "probabilities": {"low": 1 - high, "high": high}})),
        )
        o: Outcome = self.world.outcome(p, urgency=label)
        row: GroundTruth = self.world.ground_truth(p, o)
        for event in (p, o, row):
            self.world.send(event)
        self.minute += 1
        return p.prediction_id

    def text(self) -> str:
        return " ".join(self.chance.choices(WORDS, k=12))

    def good(self, count: int, **others: Any) -> None:
        for _ in range(count):
            self.send({"text": self.text(), "channel": "mail", "amount": 20.0, **others})


@pytest.fixture
def desk(world: World) -> Desk:
    return Desk(world)


def look(desk: Desk, lake: WritableLake, last: int | None = None) -> Inspection:
    """Inspect everything, or what came after minute `last` against what came before."""
    desk.world.pour(lake)
    contract = desk.world.contracts[STREAM]
    end = START + timedelta(days=30)
    if last is None:
        return inspect(lake, contract, START, end, None)
    middle = START + timedelta(minutes=last)
    return inspect(lake, contract, middle, end, (START, middle))


def values(found: Inspection, measure: str) -> dict[str, float]:
    return {m.of: m.value for m in found.measures if m.measure == measure}


@pytest.mark.parametrize(
    ("inputs", "broken"),
    [
        ({"text": "All is well, thank you."}, set()),
        ({"text": "no"}, {"text_length"}),
        ({"text": "x" * 201}, {"text_length"}),
        ({"text": "write to jo.b+x@mail.example.org"}, {"no_personal_data"}),
        ({"text": "call +44 20 7946 0958 now"}, {"no_personal_data"}),
        ({"text": "pay to DE89 3704 0044 0532 0130 00 please"}, {"no_personal_data"}),
        ({"text": "card 4111 1111 1111 1111"}, {"no_personal_data"}),
        ({"text": "card 4111 1111 1111 1112"}, set()),  # the check digit is wrong: an order number
        ({"text": "from 192.168.7.12 it fails"}, {"no_personal_data"}),
        ({"text": "version 1.2.3 of 2024-01-05 at 10:30"}, set()),
        ({"text": "fine", "channel": "fax"}, {"known_channel"}),
        ({"text": "fine", "channel": "MAIL"}, {"known_channel", "lower_case"}),
        ({"text": "fine", "channel": None, "amount": None}, set()),
        ({"text": "fine", "amount": -0.5}, {"amount_range"}),
        ({"text": "fine", "amount": 1000}, set()),
        ({"text": "fine", "channel": "chat", "amount": 700}, {"chat_is_small"}),
        ({"text": "fine", "channel": "chat"}, set()),
    ],
)
def test_a_row_is_quarantined_by_the_rules_it_breaks(
    desk: Desk, lake: WritableLake, inputs: dict[str, Any], broken: set[str]
) -> None:
    broken_id = desk.send(inputs)
    desk.good(3)
    found = look(desk, lake)
    assert {(f.prediction_id, f.rule) for f in found.findings} == {(broken_id, rule) for rule in broken}
    assert values(found, "quarantined")[""] == (0.25 if broken else 0)


def test_a_rule_about_the_outcome_and_one_that_only_warns(desk: Desk, lake: WritableLake) -> None:
    odd = desk.send({"text": "many thanks"}, "whatever")
    desk.good(3)
    found = look(desk, lake)
    assert [(f.prediction_id, f.rule) for f in found.findings] == [(odd, "known_urgency")]
    broken = values(found, "broken")
    assert (broken["known_urgency"], broken["polite"], broken["amount_range"]) == (0.25, 0.75, 0)


def test_what_is_quarantined_does_not_repeat_the_value(desk: Desk, lake: WritableLake) -> None:
    desk.send({"text": "write to jo@mail.example"})
    assert "jo@" not in str(look(desk, lake).findings)


def test_planted_bad_values_are_found_and_a_blind_rule_shows(desk: Desk, lake: WritableLake) -> None:
    desk.good(1)
    recalls = values(look(desk, lake), "canary_recall")
    assert recalls.pop("known_urgency") == recalls.pop("polite") == 1
    assert recalls.keys() == {"text_length", "no_personal_data", "known_channel", "amount_range", "lower_case"}
    assert all(recall == 1 for rule, recall in recalls.items() if rule != "no_personal_data")
    assert recalls["no_personal_data"] >= 0.99
    chance = random.Random(1)
    cards = canaries(Rule(name="r", field="text", free_of=["card"]), chance, CANARIES)
    emails_only = is_broken(
        Rule(name="r", field="text", free_of=["email"]), desk.world.contracts[STREAM], lambda _: "v"
    )
    with lake.with_tables({"planted": pa.table({"v": cards})}):
        assert lake.rows(f"select count(*) filter ({emails_only}) as n from planted") == [{"n": 0}]


def test_same_inputs_with_other_labels_are_conflicts(desk: Desk, lake: WritableLake) -> None:
    for label in ("low", "high", "low"):
        desk.send({"text": "the very same question"}, label)
    desk.send({"text": "another question"})
    desk.send({"text": "another question"})
    assert values(look(desk, lake), "conflicts")[""] == pytest.approx(3 / 5)


def test_near_duplicates_are_counted(config: Config, lake: WritableLake) -> None:
    contract_with(config, "{near_duplicates: 0.5}")
    desk = Desk(World(config))
    long = " ".join(f"word{n}" for n in range(40))
    desk.send({"text": long})
    desk.send({"text": long.upper()})
    desk.send({"text": long + " again"})
    desk.send({"text": long})
    desk.send({"text": " ".join(f"other{n}" for n in range(40))})
    desk.send({"text": "short"})
    assert values(look(desk, lake), "near_duplicates")[""] == pytest.approx(3 / 6)


def test_a_confident_model_suspects_a_wrong_label(desk: Desk, lake: WritableLake) -> None:
    for n in range(40):
        desk.send({"text": desk.text()}, "high" if n % 2 else "low", high=0.9 if n % 2 else 0.1)
    wrong = desk.send({"text": desk.text()}, "low", high=0.97)
    unsure = desk.send({"text": desk.text()}, "low", high=0.55)
    found = look(desk, lake)
    [row] = lake.rows("select prediction_id, label, guess from suspects")
    assert row == {"prediction_id": wrong, "label": "low", "guess": "high"}
    assert unsure != wrong
    assert values(found, "suspects")[""] == pytest.approx(1 / 42)
    assert SUSPECTED not in {f.rule for f in found.findings}  # only where the contract gives a bound


def stability(p: Sequence[str], q: Sequence[str]) -> float:
    """The index by its definition, each bin half a row more."""
    bins, now, then = {*p, *q}, Counter(p), Counter(q)
    total = 0.0
    for name in bins:
        a = (now[name] + 0.5) / (len(p) + 0.5 * len(bins))
        b = (then[name] + 0.5) / (len(q) + 0.5 * len(bins))
        total += (a - b) * math.log(a / b)
    return total


LABELS = st.lists(st.sampled_from(["low", "high"]), min_size=1, max_size=30)


@settings(max_examples=15, deadline=None)
@given(before=LABELS, after=LABELS)
def test_label_drift_is_the_population_stability_index(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], after: list[str]
) -> None:
    config = settings_of(tmp_path_factory.mktemp("drift"), "drift")
    contract_with(config)
    desk = Desk(World(config))
    for label in [*before, *after]:
        desk.send({"text": "anything"}, label)
    with open_lake_for_writing(config) as lake:
        found = look(desk, lake, last=len(before))
    assert values(found, "label_drift")[""] == pytest.approx(stability(after, before))
    assert 0 <= values(found, "label_divergence")[""] <= math.log(2) + 1e-9


def test_inputs_that_move_drift_and_others_do_not(desk: Desk, lake: WritableLake) -> None:
    for n in range(200):
        desk.send({"text": desk.text(), "channel": "mail" if n % 2 else "chat", "amount": float(n % 100)})
    for n in range(200):
        desk.send({"text": desk.text(), "channel": "mail", "amount": float(n % 100)})
    drift = values(look(desk, lake, last=200), "input_drift")
    assert drift["amount"] < 0.01 < 0.5 < drift["channel"]
    assert drift["text"] < 0.2


def test_a_slice_that_is_seldom_labeled_shows(desk: Desk, lake: WritableLake) -> None:
    for n in range(100):
        desk.send({"text": desk.text(), "channel": "mail"})
        p = desk.world.prediction(5000 + n)
        chat = msgspec.structs.replace(p, inputs=msgspec.Raw(encode({"text": desk.text(), "channel": "chat"})))
        desk.world.send(chat)
        if n % 4 == 0:
            o = desk.world.outcome(chat)
            desk.world.send(o)
            desk.world.send(desk.world.ground_truth(chat, o))
    ratios = values(look(desk, lake), "slice_ratio")
    assert ratios == pytest.approx({"channel=chat": 0.4, "channel=mail": 1.6})


def seal_all(world: World, lake: WritableLake) -> int:
    sealer, count = Sealer(lake, world.contracts, world.names), 0
    while windows := sealer.seal(world.guard(lake)):
        count += len(windows)
    return count


def test_no_model_learns_from_quarantined_rows_until_they_are_released(desk: Desk, lake: WritableLake) -> None:
    world, contract = desk.world, desk.world.contracts[STREAM]
    desk.good(20)
    bad = desk.send({"text": "write to jo@mail.example"})
    desk.good(40)
    desk.minute += 3 * 1440
    desk.good(1)
    world.pour(lake)
    assert seal_all(world, lake) == 1
    windows = sealed_windows(lake, STREAM)
    assert (windows[0].window, len(rows_of(lake, contract, windows, {bad}))) == (1, 49)
    held = lake.rows("select prediction_id, rule, state from quarantined")
    assert held == [{"prediction_id": bad, "rule": "no_personal_data", "state": "quarantined"}]
    measured = lake.rows("select value from quality where measure = 'quarantined'")
    assert measured == [{"value": pytest.approx(1 / 50)}]

    def learned() -> bool:
        selection = select(lake, contract, windows, 1, unfit(lake, STREAM))
        return bad in {row.prediction_id for row in [*selection.learn, *selection.calibrate]}

    assert not learned()
    decision = {"stream": STREAM, "prediction_id": bad, "state": "released", "by": "ann", "note": "", "offset": 7}
    lake.append({"decisions": pa.Table.from_pylist([decision], TABLES["decisions"])})
    assert lake.rows('select state, "by" from quarantined') == [{"state": "released", "by": "ann"}]
    assert learned()
    lake.append(
        {"decisions": pa.Table.from_pylist([{**decision, "state": "rejected", "offset": 8}], TABLES["decisions"])}
    )
    assert not learned()


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ("{quarantined: 0.01}", "quarantined 0.020, most 0.01"),
        ("{largest_label: 0.9}", "largest_label 1.000, most 0.9"),
        ("{slice_ratio: 0.99}", None),
        ("{canary_recall: 0.9}", None),
    ],
)
def test_a_window_beyond_a_bound_is_not_sealed(
    config: Config, lake: WritableLake, bounds: str, reason: str | None
) -> None:
    contract_with(config, bounds)
    desk = Desk(World(config))
    desk.send({"text": "write to jo@mail.example", "channel": "mail"})
    desk.good(60)
    desk.minute += 3 * 1440
    desk.good(1)
    desk.world.pour(lake)
    assert seal_all(desk.world, lake) == (0 if reason else 1)
    if reason:
        contract = desk.world.contracts[STREAM]
        waiting = next_window(lake, desk.world.contracts, desk.world.names, STREAM, watermark_of(lake, contract))
        assert waiting.waits_for == f"quality: {reason} (the contract's quality.bounds)"
        assert lake.rows("select count(*) as n from quarantine") == [{"n": 0}]


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("{name: a, field: text, length: [1, 2], matches: x}", "exactly one condition"),
        ("{name: a, field: text}", "exactly one condition"),
        ("{name: a, field: nothing, length: [1, 2]}", "must be one of text, channel, amount, values.urgency"),
        ("{name: a, field: text, range: [1, 2]}", "range is for numbers"),
        ("{name: a, field: amount, one_of: [x]}", "one_of is for texts"),
        ("{name: a, field: text, length: [3, 2]}", "3 is above 2"),
        ("{name: a, field: text, matches: '['}", "not a regular expression"),
        ("{name: a, field: text, matches: '(?=x)x'}", "look-around"),
        ("{name: a, check: 'amount + 1'}", "write a condition"),
        ("{name: a, check: 'nothing > 1'}", "check: "),
        ("{name: a, field: text, check: 'amount > 1'}", "leave field out"),
        ("{name: a, field: text, free_of: [names]}", "free_of"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(config: Config, rule: str, problem: str) -> None:
    path = Path(config.contracts) / "tickets.yaml"
    text = CONTRACT.replace("{BOUNDS}", "{}")
    path.write_text(text[: text.index("  rules:")] + f"  rules: [{rule}]\n")
    with pytest.raises(ContractError) as refused:
        load_contract(path)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        ("{conflicts: 1.5}", "is a share"),
        ("{label_drift: -1}", "must not be negative"),
        ("{label_drift: 1.5}", None),
        ("{suspect: 0.1}", "unknown field"),
    ],
)
def test_bounds_are_checked(config: Config, bounds: str, problem: str | None) -> None:
    if problem is None:
        contract_with(config, bounds)
    else:
        with pytest.raises(ContractError, match=problem):
            contract_with(config, bounds)
