"""Personal data is hidden before it leaves the service, and what is sent in its place passes the contract."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from accrual import Recorder, Rejected
from accrual.cli import app
from accrual.config import Config, Kafka, Pii, Topics
from accrual.contract import Contract, load_contract
from accrual.contract_change import breaking_changes
from accrual.errors import ConfigError, ContractError
from accrual.events import encode, read_outcome, read_prediction
from accrual.kafka import TopicNames, create_topics, read_to_end
from accrual.pii import Hider, pseudonym_of

KEY = "0123456789abcdef0123456789abcdef"
DOCUMENT = """
stream: cases
inputs:
  text: {type: string}
  name: {type: string, was: full_name, pii: redact}
  born: {type: integer, optional: true, pii: redact}
  email: {type: string, pii: pseudonymise, max_length: 60}
output: {classes: [yes, no]}
outcome:
  values: {verdict: {type: string}, judge: {type: string, optional: true, pii: pseudonymise}}
label: {field: verdict}
join: {by: customer, pseudonymise: true}
horizon: 30d
training: {template: '{text}'}
"""
PERSON = {"text": "hello", "name": "Alice Liddell", "born": 1852, "email": "alice@wonder.land"}


def contract_of(folder: Path, **changes: Any) -> Contract:
    """The contract with keys replaced: `inputs__email={...}`."""
    document = yaml.safe_load(DOCUMENT.replace("[yes, no]", "['yes', 'no']"))
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = document
        for key in parents:
            place = place[key]
        place[last] = value
    path = folder / "cases.yaml"
    path.write_text(yaml.safe_dump(document))
    return load_contract(path)


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    return contract_of(tmp_path)


def test_what_reaches_kafka_holds_no_personal_data_and_passes_the_contract(
    bootstrap: str, prefix: str, tmp_path: Path, contract: Contract
) -> None:
    config = Config(
        kafka=Kafka(bootstrap_servers=bootstrap),
        topics=Topics(prefix=prefix, partitions=2),
        contracts=str(tmp_path),
        pii=Pii(KEY),
    )
    create_topics(config)
    said = {"label": "yes", "probabilities": {"yes": 0.9, "no": 0.1}}
    with Recorder("cases", config) as recorder:
        recorder.predict(PERSON, said, model="m@1", entity="customer-4711")
        old_name = {"full_name" if k == "name" else k: v for k, v in PERSON.items()}
        recorder.predict(old_name, said, model="m@1", entity="customer-4711")
        recorder.outcome(None, {"verdict": "yes", "judge": "Judge Knave"}, entity="customer-4711")
        with pytest.raises(Rejected, match="entity"):
            recorder.predict(PERSON, said, model="m@1", entity="")
    names, contracts = TopicNames(prefix), {"cases": contract}
    sent = [*read_to_end(config, names.predictions), *read_to_end(config, names.outcomes)]
    everything = b"".join((m.key() or b"") + (m.value() or b"") for m in sent)
    for secret in (b"Alice", b"1852", b"wonder", b"4711", b"Knave"):
        assert secret not in everything
    read = read_prediction, read_prediction, read_outcome
    events = [f(m.value(), m.key(), m.timestamp()[1], contracts) for f, m in zip(read, sent, strict=True)]
    assert len({e.entity for e in events}) == 1
    inputs = msgspec.json.decode(events[0].inputs)
    assert (inputs["text"], inputs["name"], inputs["born"]) == ("hello", "[redacted]", None)
    assert inputs["email"] == pseudonym_of(KEY)("alice@wonder.land")


@given(name=st.text(), born=st.none() | st.integers(), email=st.text(), extra=st.dictionaries(st.text(), st.integers()))
def test_whatever_is_hidden_passes_the_contract(name: str, born: int | None, email: str, extra: dict[str, int]) -> None:
    contract = HIDDEN
    inputs = {**extra, "text": "x", "name": name, "born": born, "email": email}
    before = dict(inputs)
    sent = Hider(contract, KEY).inputs(inputs)
    contract.check_inputs(encode(sent))
    assert inputs == before  # the caller's own is left alone
    assert {k: v for k, v in sent.items() if k not in PERSON} == {k: v for k, v in extra.items() if k not in PERSON}
    assert sent["name"] == "[redacted]" and sent["born"] is None and sent["email"] == pseudonym_of(KEY)(email)


@given(st.text(), st.text())
def test_a_pseudonym_is_that_of_its_text_and_key(one: str, other: str) -> None:
    first, second = pseudonym_of(KEY), pseudonym_of(KEY[::-1])
    assert (first(one) == first(other)) == (one == other)
    assert first(one).split("-")[0] == first(other).split("-")[0] != second(one).split("-")[0]
    assert first(one).split("-")[1] != second(one).split("-")[1]


def test_without_a_key_the_setting_is_named(contract: Contract, tmp_path: Path) -> None:
    for key, problem in (("", "is not set"), ("short", "has 5 characters")):
        with pytest.raises(ConfigError, match=rf"ACCRUAL_PII_KEY\) {problem}.*inputs\.email of stream 'cases'"):
            Recorder("cases", Config(contracts=str(tmp_path), pii=Pii(key)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"inputs__born": {"type": "integer", "pii": "redact"}}, "needs `type: string` or `optional: true`"),
        ({"inputs__born": {"type": "integer", "optional": True, "pii": "pseudonymise"}}, "needs `type: string`"),
        ({"inputs__email__max_length": 40}, "sends 41 characters"),
        ({"inputs__name__max_length": 9}, "sends 10 characters"),
        ({"outcome__values__verdict__pii": "redact"}, "the label comes from it"),
        ({"inputs__email__pii": "encrypt"}, "encrypt"),
    ],
)
def test_a_contract_that_its_own_events_would_break_is_refused(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ContractError) as refused:
        contract_of(tmp_path, **changes)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"inputs__email": {"type": "string", "max_length": 60}}, "inputs.email: pii was pseudonymise"),
        (
            {"inputs__name": {"type": "string", "was": "full_name", "pii": "pseudonymise"}},
            "inputs.name: pii was redact",
        ),
        ({"join": {"by": "customer"}}, "join: changed"),
        ({"inputs__email__pii": "redact"}, None),
        ({"inputs__text__pii": "redact"}, None),
    ],
)
def test_what_is_hidden_stays_hidden(
    tmp_path: Path, contract: Contract, changes: dict[str, Any], refused: str | None
) -> None:
    found = breaking_changes(contract, contract_of(tmp_path, **changes))
    assert len(found) == (0 if refused is None else 1)
    assert refused is None or found[0].startswith(refused)


HIDDEN = msgspec.convert(yaml.safe_load(DOCUMENT.replace("[yes, no]", "['yes', 'no']")), Contract)


def test_the_check_of_a_contract_says_what_is_hidden(tmp_path: Path, contract: Contract) -> None:
    done = CliRunner().invoke(app, ["contract", "check", str(tmp_path / "cases.yaml")])
    said = done.output.rpartition("Hidden before it is sent: ")[2].strip(" .\n").split(", ")
    assert sorted(said) == ["born", "customer", "email", "judge", "name"]
