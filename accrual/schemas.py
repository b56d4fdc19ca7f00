"""Exports what is on the wire: a JSON Schema per event and an AsyncAPI document of the topics.

Run `python -m accrual.schemas` from a checkout to write `schemas/`; a test keeps the files equal to the code.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec
import yaml

from accrual.contract import Contract
from accrual.events import VERSION, DeadLetter, GroundTruth, Outcome, Prediction, Tick
from accrual.kafka import TopicNames
from accrual.ledger import Decision, Evaluation, Generation, Run

EVENTS: dict[str, type[msgspec.Struct]] = {
    "prediction": Prediction,
    "outcome": Outcome,
    "tick": Tick,
    "ground-truth": GroundTruth,
    "dead-letter": DeadLetter,
    "generation": Generation,
    "run": Run,
    "evaluation": Evaluation,
    "decision": Decision,
}
_FOLDER = Path("schemas")


def json_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one struct, self-contained."""
    schema = msgspec.json.schema(kind)
    reference = schema.pop("$ref").rsplit("/", 1)[1]
    own = schema["$defs"].pop(reference)
    rest = {"$defs": schema["$defs"]} if schema["$defs"] else {}
    dedented: dict[str, Any] = _dedented({"$schema": "https://json-schema.org/draft/2020-12/schema", **own, **rest})
    return dedented


def _dedented(schema: Any) -> Any:
    """The schema with its descriptions dedented: Python 3.13 does so to docstrings by itself, earlier ones do not."""
    if isinstance(schema, dict):
        return {
            key: inspect.cleandoc(value) if key == "description" and isinstance(value, str) else _dedented(value)
            for key, value in schema.items()
        }
    return [_dedented(item) for item in schema] if isinstance(schema, list) else schema


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3.0 document of Accrual's topics, under the default prefix."""
    names = TopicNames("accrual")
    channels: dict[str, tuple[str, list[str], str, str, str]] = {
        "predictions": (
            names.predictions,
            ["prediction", "tick"],
            "send",
            "prediction_id",
            "Services say what a model said; join workers how time passes where nothing is said.",
        ),
        "outcomes": (names.outcomes, ["outcome"], "send", "prediction_id", "Services say what happened."),
        "groundTruth": (
            names.ground_truth,
            ["ground-truth"],
            "receive",
            "prediction_id",
            "The join's labeled and expired predictions, exactly once. Read with isolation.level=read_committed.",
        ),
        "deadLetters": (
            names.dead_letters,
            ["dead-letter"],
            "receive",
            "the key of the original record",
            "Events that broke their contract, with the reason and the original bytes.",
        ),
        "models": (names.models, ["generation"], "receive", "stream", "The champion of each stream; compacted."),
        "training": (
            names.training,
            ["run", "evaluation", "decision"],
            "receive",
            "stream",
            "The trainer's ledger, and what people decided about rows in quarantine.",
        ),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Accrual",
            "version": str(VERSION),
            "description": "Predictions and outcomes in; ground truth, dead letters and champions out.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            channel: {
                "address": address,
                "description": f"{text} Key: {key}.",
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in events},
            }
            for channel, (address, events, _, key, text) in channels.items()
        },
        "operations": {
            f"{action}{channel[0].upper()}{channel[1:]}": {
                "action": action,
                "channel": {"$ref": f"#/channels/{channel}"},
            }
            for channel, (_, _, action, _, _) in channels.items()
        },
        "components": {
            "messages": {
                name: {"name": name, "payload": {"$ref": f"./{name}.schema.json"}, "contentType": "application/json"}
                for name in EVENTS
            }
        },
    }


def exported() -> dict[str, str]:
    """File name → content of everything under `schemas/` that is made from the code."""
    files = {f"{name}.schema.json": _as_json(json_schema(kind)) for name, kind in EVENTS.items()}
    files["contract.schema.json"] = _as_json(json_schema(Contract))
    files["asyncapi.yaml"] = yaml.safe_dump(asyncapi(), sort_keys=False, width=110)
    return files


def main() -> None:
    """Write the files of the checkout in the working directory."""
    for name, content in exported().items():
        (_FOLDER / name).write_text(content, encoding="utf-8")
        print(_FOLDER / name)


def _as_json(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    main()
