"""The exported schemas are those of the code, and say of real events what the code says."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from accrual.events import DeadLetter, Distribution, Outcome, Prediction, encode, new_prediction_id
from accrual.kafka import TopicNames
from accrual.schemas import exported

SCHEMAS = Path(__file__).parents[2] / "schemas"


@pytest.mark.parametrize("name", sorted(exported()))
def test_the_files_are_those_the_code_exports(name: str) -> None:
    assert (SCHEMAS / name).read_text() == exported()[name], "run `python -m accrual.schemas`"


def test_nothing_stale_lies_in_the_folder() -> None:
    assert {path.name for path in SCHEMAS.iterdir() if path.is_file()} == set(exported())


def _schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def test_real_events_are_valid() -> None:
    moment = "2026-05-01T12:00:00Z"
    shared = {"prediction_id": new_prediction_id(), "stream": "support-intents"}
    output = msgspec.to_builtins(Distribution(label="a", probabilities={"a": 1.0}))
    sent = {**shared, "model": "m@0", "predicted_at": moment, "inputs": {"text": "?"}, "output": output}
    prediction = msgspec.json.decode(json.dumps(sent), type=Prediction)
    answered = {**shared, "observed_at": moment, "values": {"intent": "a"}}
    outcome = msgspec.json.decode(json.dumps(answered), type=Outcome)
    letter = DeadLetter(reason="not_json", detail="", topic="t", partition=0, offset=0, key=None, value=b"\xff")
    for name, event in (("prediction", prediction), ("outcome", outcome), ("dead-letter", letter)):
        jsonschema.validate(json.loads(encode(event)), _schema(name))


def test_a_broken_event_is_not() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {"prediction_id": "p", "stream": "s", "model": "m", "predicted_at": "now", "inputs": 7, "output": {}},
            _schema("prediction"),
        )


@pytest.mark.parametrize("path", sorted((SCHEMAS / "contracts").glob("*.yaml")), ids=lambda path: path.stem)
def test_contracts_are_valid_by_their_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), _schema("contract"))


def test_asyncapi_names_every_public_topic_and_only_files_that_exist() -> None:
    document = yaml.safe_load((SCHEMAS / "asyncapi.yaml").read_text())
    names = TopicNames("accrual")
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert addresses == set(names.settings(1)) - {names.changelog}
    for message in document["components"]["messages"].values():
        assert (SCHEMAS / message["payload"]["$ref"]).is_file()
    for operation in document["operations"].values():
        assert operation["channel"]["$ref"].removeprefix("#/channels/") in document["channels"]
