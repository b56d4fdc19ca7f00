"""What a Schema Registry is asked, and what its answers mean. The registry is a stand-in: no real one is packaged."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from accrual.cli import app
from accrual.contract import load_contract
from accrual.errors import ConfigError, RegistryUnavailable
from accrual.registry import incompatibilities, register, schemas_of

CONTRACT = Path("schemas/contracts/credit-risk.yaml")


class StandInRegistry(ThreadingHTTPServer):
    """Knows subjects by their schemas; a schema that requires what the one before did not is not compatible."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.subjects: dict[str, list[dict[str, Any]]] = {}
        self.fails_with = 0

    @property
    def url(self) -> str:
        return f"http://ann:secret@127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: StandInRegistry

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["schemaType"] == "JSON"
        schema = json.loads(body["schema"])
        subject = self.path.split("/subjects/")[1].split("/")[0]
        versions = self.server.subjects.get(subject, [])
        if self.headers["Authorization"] != "Basic " + base64.b64encode(b"ann:secret").decode():
            self._answer(401, {"message": "who are you?"})
        elif self.server.fails_with:
            self._answer(self.server.fails_with, {"message": "out of order"})
        elif self.path.startswith("/compatibility"):
            if not versions:
                self._answer(404, {"error_code": 40401, "message": "no subject"})
                return
            new = set(schema["required"]) - set(versions[-1]["required"])
            self._answer(200, {"is_compatible": not new, "messages": [f"REQUIRED_PROPERTY_ADDED {n}" for n in new]})
        else:
            self.server.subjects.setdefault(subject, []).append(schema)
            self._answer(200, {"id": 1})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def registry() -> Iterator[StandInRegistry]:
    with StandInRegistry() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def changed(tmp_path: Path) -> Path:
    text = CONTRACT.read_text().replace("title: {type: string, optional: true", "title: {type: string")
    path = tmp_path / "credit-risk.yaml"
    path.write_text(text)
    return path


def test_what_it_registers_describes_the_events() -> None:
    inputs, values = map(json.loads, schemas_of(load_contract(CONTRACT)).values())
    for schema in (inputs, values):
        jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate({"status": "Fully Paid"}, values)
    with pytest.raises(jsonschema.ValidationError, match=r"title|amount"):
        jsonschema.validate({"amount": -5}, inputs)


def test_the_registry_decides(registry: StandInRegistry, tmp_path: Path) -> None:
    old, new = load_contract(CONTRACT), load_contract(changed(tmp_path))
    assert incompatibilities(registry.url, old) == []  # nothing is registered yet
    register(registry.url, old)
    assert set(registry.subjects) == {"credit-risk.inputs", "credit-risk.values"}
    assert incompatibilities(registry.url, old) == []
    assert incompatibilities(registry.url, new) == ["credit-risk.inputs: REQUIRED_PROPERTY_ADDED title"]


def test_its_failures_are_named(registry: StandInRegistry) -> None:
    contract = load_contract(CONTRACT)
    with pytest.raises(ConfigError, match="refuses its credentials") as refused:
        incompatibilities(registry.url.replace("secret", "wrong"), contract)
    assert "wrong" not in str(refused.value)
    registry.fails_with = 503
    with pytest.raises(RegistryUnavailable, match="answers 503"):
        incompatibilities(registry.url, contract)
    with pytest.raises(RegistryUnavailable, match="no Schema Registry answers"):
        incompatibilities("http://127.0.0.1:9", contract)


def test_the_commands(registry: StandInRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    unset = run(app, ["contract", "register", str(CONTRACT)])
    assert isinstance(unset.exception, ConfigError)
    monkeypatch.setenv("ACCRUAL_REGISTRY_URL", registry.url)
    assert run(app, ["contract", "register", str(CONTRACT)]).exit_code == 0
    assert "fine" in run(app, ["contract", "check", str(CONTRACT)]).stdout
    refused = run(app, ["contract", "check", str(changed(tmp_path))])
    assert "REQUIRED_PROPERTY_ADDED title" in str(refused.exception)
