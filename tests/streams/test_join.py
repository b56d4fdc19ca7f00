"""The join is a function of the set of events: order, repetition and the passing of time between change no row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accrual.contract import Contract
from accrual.events import NULL, GroundTruth, Outcome, Prediction, decode_ground_truth, encode, instant, microseconds
from accrual.label_rule import Label
from streams.join import (
    Entry,
    Letter,
    Progress,
    Step,
    advance,
    apply_outcome,
    apply_prediction,
    decision,
    due,
    ground_truth,
    on_time,
    pack,
    seen_of,
    unpack_entry,
)

START = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = 3_600_000_000
HORIZON, DISORDER, REMEMBER = 10, 1, 40  # hours

Distinct = tuple[datetime, bytes, str]


def contract(late: str = "count", on_expiry: str = "censored", label: dict[str, Any] | None = None) -> Contract:
    return msgspec.convert(
        {
            "stream": "loans",
            "inputs": {"amount": {"type": "number"}},
            "output": {"classes": ["paid", "lost"]},
            "outcome": {"values": {"status": {"type": "string"}, "weight": {"type": "number", "optional": True}}},
            "label": label or {"field": "status"},
            "horizon": f"{HORIZON}h",
            "disorder": f"{DISORDER}h",
            "remember": f"{REMEMBER}h",
            "late": late,
            "on_expiry": on_expiry,
            "training": {"template": "{amount}"},
        },
        Contract,
    )


def prediction(hour: float = 0, model: str = "loans@0") -> Prediction:
    return Prediction(
        prediction_id="p",
        stream="loans",
        model=model,
        predicted_at=START + timedelta(hours=hour),
        inputs=msgspec.Raw(b'{"amount": 1.0}'),
        output=msgspec.Raw(b'{"label":"paid","probabilities":{"paid":1.0}}'),
    )


def outcome(hour: float, status: str = "paid", source: str = "outcome", weight: float = 1) -> Outcome:
    return Outcome(
        prediction_id="p",
        stream="loans",
        observed_at=START + timedelta(hours=hour),
        values=msgspec.Raw(encode({"status": status, "weight": weight})),
        source=source,
    )


def at(hour: float) -> int:
    """The watermark at that hour."""
    return microseconds(START) + int(hour * HOUR)


class Run:
    """Feeds events and ticks to the join one by one, through its serialised form, and keeps what comes out."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.entry: Entry | None = None
        self.watermark = 0
        self.rows: list[GroundTruth] = []
        self.letters: list[Letter] = []
        self.dropped: list[str] = []
        self.joined = 0

    def feed(self, event: Prediction | Outcome | int) -> Step:
        before = self.entry
        if isinstance(event, Prediction):
            step = apply_prediction(
                before, self.contract, event, microseconds(event.predicted_at), 0, encode(event), self.watermark
            )
        elif isinstance(event, Outcome):
            step = apply_outcome(
                before, self.contract, seen_of(self.contract, event, microseconds(event.observed_at)), 0, encode(event)
            )
        else:
            self.watermark = max(self.watermark, event)
            step = Step(before) if before is None else on_time(before, self.contract, self.watermark)
        self.entry = None if step.entry is None else unpack_entry(pack(step.entry))
        assert self.entry == step.entry
        self.rows += [decode_ground_truth(ground_truth(step.row, self.contract, "p"))] if step.row else []
        self.letters += step.letters
        self.dropped += step.dropped
        if step.entry is not None:
            revision, said = (before.revision, before.said) if before else (0, None)
            self.joined += step.entry.revision - revision + (step.entry.said is not None and said is None)
        return step

    @property
    def current(self) -> GroundTruth | None:
        return max(self.rows, key=lambda row: row.revision, default=None)

    @property
    def reasons(self) -> list[str]:
        return [letter.reason for letter in self.letters]


def expected(contract: Contract, said: Prediction, outcomes: list[Outcome], watermark: int) -> GroundTruth | None:
    """The current row by brute force, straight from the definition in docs/contract.md."""
    deadline = said.predicted_at + timedelta(hours=HORIZON)
    distinct = {(o.observed_at, bytes(o.values), o.source) for o in outcomes}
    counting = sorted(o for o in distinct if contract.late == "revise" or o[0] <= deadline)
    common: dict[str, Any] = {
        "prediction_id": "p",
        "stream": "loans",
        "model": said.model,
        "predicted_at": said.predicted_at,
        "inputs": said.inputs,
        "output": said.output,
    }
    if decided := by_definition(contract.label, counting):
        label, (observed_at, values, source) = decided
        return GroundTruth(
            **common,
            revision=len(counting),
            status="labeled",
            label=label,
            observed_at=observed_at,
            values=msgspec.Raw(values),
            source=source,
        )
    if instant(watermark) >= deadline:
        label = None if contract.on_expiry == "censored" else contract.on_expiry
        return GroundTruth(
            **common, revision=0, status="expired", label=label, observed_at=None, values=NULL, source=None
        )
    return None


def by_definition(rule: Label, counting: list[Distinct]) -> tuple[str, Distinct] | None:
    """The label of outcomes that count, and the one its row shows; None if there is none."""
    if len(counting) < rule.complete_when:
        return None
    ranked = rule.sources or []
    for source in [*ranked, None]:
        of_it = sorted(o for o in counting if (o[2] == source if source else o[2] not in ranked))
        said = [(msgspec.json.decode(values), (at, values, source)) for at, values, source in of_it]
        if rule.take == "sum":
            total = sum(Fraction(str(values["weight"])) for values, _ in said)
            floors = {label: Fraction(str(floor)) for label, floor in (rule.thresholds or {}).items()}
            reached = {floor: label for label, floor in floors.items() if total >= floor}
            if reached and said:
                return reached[max(reached)], said[-1][1]
        elif said:
            voters = {label: [o for values, o in said if values["status"] == label] for label in ("paid", "lost")}
            [(_, last, most)] = sorted((len(o), o[-1], label) for label, o in voters.items() if o)[-1:]
            if rule.take == "majority":
                return most, last
            values, o = said[-1 if rule.take == "last" else 0]
            return values["status"], o
    return None


@st.composite
def labels(draw: st.DrawFn) -> dict[str, Any]:
    """Any rule for labels."""
    take = draw(st.sampled_from(["last", "first", "majority", "sum"]))
    rule: dict[str, Any] = {
        "field": "weight" if take == "sum" else "status",
        "take": take,
        "complete_when": draw(st.integers(1, 3)),
        "sources": draw(st.sampled_from([None, ["b"], ["b", "a"]])),
    }
    if take == "sum":
        rule["thresholds"] = draw(st.sampled_from([{"paid": 0.3, "lost": 0.2}, {"paid": 1, "lost": 0}, {"lost": 0.7}]))
    return rule


contracts = st.builds(
    contract, st.sampled_from(["revise", "dead_letter", "count"]), st.sampled_from(["censored", "paid"]), labels()
)
outcomes = st.builds(
    outcome,
    st.integers(-2, 20),
    st.sampled_from(["paid", "lost"]),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([0, 0.1, 0.2, 1]),
)
ticks = st.integers(-5, 60).map(at)


@st.composite
def stories(draw: st.DrawFn) -> tuple[Contract, list[Prediction | Outcome | int]]:
    """A contract and the events of one id in any order, some of them repeated, with watermarks anywhere between."""
    some = draw(st.lists(outcomes, max_size=5))
    repeated = draw(st.lists(st.sampled_from(some), max_size=3)) if some else []
    said = [prediction()] * draw(st.integers(1, 2))
    return draw(contracts), draw(st.permutations([*said, *some, *repeated, *draw(st.lists(ticks, max_size=6))]))


@settings(max_examples=500, deadline=None)
@given(stories())
def test_the_current_row_depends_on_the_set_of_events_only(
    story: tuple[Contract, list[Prediction | Outcome | int]],
) -> None:
    rules, events = story
    some = [event for event in events if isinstance(event, Outcome)]
    # Time that keeps its promise: it has not passed what is still on its way by more than disorder, nor forgotten.
    first = min([o.observed_at for o in some] + [prediction().predicted_at])
    honest = microseconds(first) + (HORIZON + DISORDER) * HOUR
    run = Run(rules)
    for event in events:
        came = run.entry is not None and run.entry.said is not None
        limit = at(HORIZON + REMEMBER) if came else honest
        run.feed(min(event, limit) if isinstance(event, int) else event)
    run.feed(run.watermark)  # as every turn of the loop does
    assert run.current == expected(rules, prediction(), some, run.watermark)
    assert len({row.revision for row in run.rows}) == len(run.rows)
    late = {(o.observed_at, bytes(o.values), o.source) for o in some if microseconds(o.observed_at) > at(HORIZON)}
    assert run.reasons == ["late"] * (len(late) if rules.late == "dead_letter" else 0)
    assert run.dropped.count("late_outcome") == (len(late) if rules.late == "count" else 0)


@given(stories())
def test_every_event_is_accounted_for_whatever_time_does(
    story: tuple[Contract, list[Prediction | Outcome | int]],
) -> None:
    rules, events = story
    run = Run(rules)
    for event in events:
        run.feed(event)
    waiting = len(run.entry.waiting) if run.entry else 0
    came = sum(not isinstance(event, int) for event in events)
    assert run.joined + len(run.letters) + len(run.dropped) + waiting == came


@given(stories())
def test_due_is_when_time_next_matters(story: tuple[Contract, list[Prediction | Outcome | int]]) -> None:
    rules, events = story
    run = Run(rules)
    for event in events:
        run.feed(event)
        if run.entry is not None:
            when = due(run.entry, rules)
            quiet = on_time(run.entry, rules, when - 1)
            if run.watermark < when:
                assert quiet == Step(run.entry)
            assert on_time(run.entry, rules, max(when, run.watermark)) != Step(run.entry)


def test_an_outcome_that_comes_first_waits_for_its_prediction() -> None:
    run = Run(contract())
    run.feed(outcome(3, "lost"))
    run.feed(outcome(2, "paid"))
    assert run.rows == []
    run.feed(prediction())
    assert [(row.revision, row.label) for row in run.rows] == [(2, "lost")]


def test_a_second_prediction_with_other_content_is_a_dead_letter_and_the_first_counts() -> None:
    run = Run(contract())
    for event in (prediction(), prediction(model="loans@1"), prediction(), outcome(1)):
        run.feed(event)
    assert run.reasons == ["conflicting_prediction"]
    assert run.dropped == ["duplicate_prediction"]
    assert run.current is not None
    assert run.current.model == "loans@0"


def test_an_expired_prediction_is_labeled_by_an_outcome_that_was_in_time_but_arrived_late() -> None:
    run = Run(contract(on_expiry="paid"))
    for event in (prediction(), at(HORIZON), outcome(9, "lost")):
        run.feed(event)
    assert [(row.revision, row.status, row.label) for row in run.rows] == [
        (0, "expired", "paid"),
        (1, "labeled", "lost"),
    ]


def test_expiry_comes_at_the_deadline_and_not_before() -> None:
    run = Run(contract())
    run.feed(prediction())
    run.feed(at(HORIZON) - 1)
    assert run.rows == []
    run.feed(at(HORIZON))
    run.feed(at(HORIZON) + 1)
    assert [row.status for row in run.rows] == ["expired"]


def test_below_its_quorum_a_prediction_expires_and_one_more_outcome_labels_it() -> None:
    run = Run(contract(on_expiry="lost", label={"field": "status", "take": "majority", "complete_when": 3}))
    for event in (prediction(), outcome(1), outcome(2, "lost"), outcome(2, "lost"), at(HORIZON), at(HORIZON) + 1):
        run.feed(event)
    assert [(row.revision, row.status, row.label, row.source) for row in run.rows] == [(0, "expired", "lost", None)]
    run.feed(outcome(3))
    run.feed(outcome(4, "lost"))
    assert [(row.revision, row.status, row.label) for row in run.rows[1:]] == [
        (3, "labeled", "paid"),
        (4, "labeled", "lost"),
    ]


def test_the_best_source_decides_and_every_outcome_is_a_revision() -> None:
    run = Run(contract(label={"field": "status", "sources": ["agent", "click"]}))
    for event in (prediction(), outcome(5, "lost", "other"), outcome(1, "paid", "click"), outcome(0, "lost", "agent")):
        run.feed(event)
    run.feed(outcome(9, "paid", "click"))
    assert [(row.revision, row.label, row.source) for row in run.rows] == [
        (1, "lost", "other"),
        (2, "paid", "click"),
        (3, "lost", "agent"),
        (4, "lost", "agent"),
    ]


def test_a_sum_is_exact() -> None:
    rule = {"field": "weight", "take": "sum", "thresholds": {"paid": 0.8, "lost": 0}}
    run = Run(contract(label=rule))
    run.feed(prediction())
    for hour in range(8):
        run.feed(outcome(hour, weight=0.1))  # added as floats that is 0.7999999999999999
    assert [row.label for row in run.rows] == ["lost"] * 7 + ["paid"]


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ({"field": "status"}, 1),
        ({"field": "status", "take": "first", "sources": ["a"]}, 1),
        ({"field": "status", "take": "majority", "sources": ["a"]}, 3),
        ({"field": "status", "take": "majority"}, 6),
    ],
)
def test_an_entry_keeps_no_more_outcomes_than_the_label_needs(label: dict[str, Any], kept: int) -> None:
    run = Run(contract(label=label))
    run.feed(prediction())
    some = [outcome(hour, source=source) for hour in range(3) for source in ("a", "b")]
    for event in [*some, *some]:
        run.feed(event)
    assert run.entry is not None
    assert (len(run.entry.kept), run.entry.revision) == (kept, 6)
    assert run.dropped == ["duplicate_outcome"] * 6


def test_an_outcome_is_known_again_when_the_contract_has_changed_what_it_says() -> None:
    run = Run(contract())
    run.feed(prediction())
    run.feed(outcome(1))
    run.contract = contract(label={"field": "status", "map": {"paid": "lost"}})
    run.feed(outcome(1))
    assert run.dropped == ["duplicate_outcome"]


def test_what_was_kept_for_another_rule_still_has_a_label() -> None:
    run = Run(contract(label={"field": "status", "take": "majority"}))
    for event in (prediction(), outcome(1), outcome(2), outcome(3, "lost")):
        run.feed(event)
    assert run.entry is not None
    decided = decision(run.entry, contract())
    assert decided is not None
    assert decided.label == "lost"


def test_an_orphan_is_given_up_one_by_one_and_keeps_its_record() -> None:
    run = Run(contract())
    first, second = outcome(0), outcome(5)
    run.feed(first)
    run.feed(second)
    run.feed(at(HORIZON + DISORDER))
    assert run.letters == []
    run.feed(at(HORIZON + DISORDER) + 1)
    assert [(letter.reason, letter.record) for letter in run.letters] == [("orphan", encode(first))]
    run.feed(prediction())
    assert run.current is not None
    assert run.current.revision == 1


def test_what_was_forgotten_is_not_joined_twice() -> None:
    run = Run(contract())
    for event in (prediction(), outcome(1), at(HORIZON + REMEMBER) + 1):
        run.feed(event)
    assert run.entry is None
    run.feed(prediction())
    assert run.entry is None
    assert run.reasons == ["too_old"]


@pytest.mark.parametrize(
    ("drained", "watermark"),
    [((False, False), 4), ((True, False), 4), ((False, True), 8), ((True, True), 8)],
)
def test_the_slower_topic_holds_the_watermark_back_unless_it_is_drained(
    drained: tuple[bool, bool], watermark: int
) -> None:
    behind = Progress(predictions=at(9), outcomes=at(5))
    moved = advance(behind, contract(), predictions_drained=drained[0], outcomes_drained=drained[1])
    assert moved.watermark == at(watermark)


def test_the_watermark_never_goes_back_and_starts_with_the_first_events() -> None:
    nothing = Progress()
    assert advance(nothing, contract(), predictions_drained=True, outcomes_drained=True) == nothing
    one_side = Progress(predictions=at(9))
    assert advance(one_side, contract(), predictions_drained=False, outcomes_drained=False) == one_side
    ahead = Progress(predictions=at(9), outcomes=at(2), watermark=at(8))
    assert advance(ahead, contract(), predictions_drained=False, outcomes_drained=False) == ahead
