"""The contract of a stream: what its events hold, what the label is, when it is final, how models are made from it.

A contract is a YAML file; `docs/contract.md` documents every field. It is read and checked once, at the edge, and
trusted inside. Payload checks are compiled to msgspec types, so an event costs microseconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from accrual.contract_yaml import hint, line_of, read_yaml
from accrual.errors import ContractError, Rejected
from accrual.expression import Node, evaluator, label_text, parse
from accrual.label_rule import Label, inconsistencies, summand
from accrual.output import COMPLETIONS, Output, output_mistakes
from accrual.quality_rules import Quality, mistakes
from accrual.training_policy import Gate, Training, control_mistakes, policy_mistakes, trigger_mistakes

MAX_ID_LENGTH = 128
REMEMBERED_VALUES = 20_000  # about a batch
CENSORED = "censored"
REDACTED = "[redacted]"
PSEUDONYM_LENGTH = 41

_DURATION = re.compile(r"(\d+)(ms|s|m|h|d|y)")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "y": 365 * 86400.0}
_LONGEST_SLICE = 40  # characters of a value in a slice's name
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
Text = str | tuple[str, ...]
"""What a model reads of a row: a text, a pair of them, or a prompt and what was written for it, one text or two."""
Pair = Literal["difference", "comparison"]
_TYPES: dict[str, Any] = {"string": str, "number": float, "integer": int, "boolean": bool}


def parse_duration(text: str) -> timedelta:
    """`30d`, `12h`, `1y` (365 days), `500ms` → timedelta. Raises ValueError naming the accepted forms."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a duration; write a whole number and a unit: 500ms, 30s, 15m, 12h, 30d, 1y")
    return timedelta(seconds=int(match[1]) * _UNIT_SECONDS[match[2]])


class Field(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Type and bounds of one input or outcome value. An `optional` one may be absent or null.

    `was`: names it had before, latest first. Events and rows that use one of them are read all the same.
    `pii`: it is about a person, and the SDK hides it before an event leaves the service: `redact` sends null (or
    "[redacted]" where it must be there), `pseudonymise` a keyed hash.
    """

    type: Literal["string", "number", "integer", "boolean"]
    optional: bool = False
    max_length: int | None = None
    minimum: float | None = None
    maximum: float | None = None
    was: str | list[str] = []
    pii: Literal["redact", "pseudonymise"] | None = None
    description: str = ""

    @property
    def names_before(self) -> list[str]:
        """The names it had before, latest first."""
        return [self.was] if isinstance(self.was, str) else self.was

    def annotation(self) -> Any:
        """The msgspec type that checks a value of this field."""
        bounds: dict[str, Any] = {}
        if self.max_length is not None:
            bounds["max_length"] = self.max_length
        for name, bound in (("ge", self.minimum), ("le", self.maximum)):
            if bound is not None:
                bounds[name] = int(bound) if self.type == "integer" else bound
        kind = _TYPES[self.type]
        checked = Annotated[kind, msgspec.Meta(**bounds)] if bounds else kind
        return checked | None if self.optional else checked


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the outcome event carries."""

    values: dict[str, Field]


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Outcomes name a business key instead of a prediction: events carry it as their `entity`.

    `by`: what the key is, for people: `loan_id`. `to`: an outcome belongs to the `latest` prediction made for the
    entity before it, within the horizon, or to `all` of them. `pseudonymise`: the SDK sends a keyed hash of it.
    """

    by: str
    to: Literal["latest", "all"] = "latest"
    pseudonymise: bool = False


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One stream's contract. Durations are text in the file; `horizon_us` and its kin give microseconds.

    `join`: when outcomes do not know their prediction's id.
    `horizon`: how long after the prediction an outcome counts.
    `on_expiry`: the label when none came: `censored` or a class.
    `late`: what an outcome observed after the horizon is: `revise` (counts all the same), `dead_letter`, or `count`
    (kept in the lake's outcomes and counted; the label stands).
    `disorder`: how far events of a partition may be out of order; the watermark trails by it.
    `remember`: how long after its horizon a prediction is still recognised as a duplicate.
    `max_ahead`: how far an event's time may be ahead of the broker's clock.
    `idle`: how long a partition must be silent before its event time goes on with the clock.
    `quality`: what rows and windows must be like to be trained on.
    """

    stream: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    inputs: dict[str, Field]
    output: Output
    outcome: Outcome
    label: Label
    horizon: str
    training: Training
    description: str = ""
    join: Join | None = None
    on_expiry: str = CENSORED
    late: Literal["revise", "dead_letter", "count"] = "count"
    disorder: str = "1h"
    remember: str = "30d"
    max_ahead: str = "1d"
    idle: str = "10m"
    gate: Gate = msgspec.field(default_factory=Gate)
    quality: Quality | None = None

    @cached_property
    def horizon_us(self) -> int:
        """The horizon in microseconds."""
        return _microseconds(self.horizon)

    @cached_property
    def disorder_us(self) -> int:
        """Bounded disorder in microseconds."""
        return _microseconds(self.disorder)

    @cached_property
    def remember_us(self) -> int:
        """Memory beyond the horizon in microseconds."""
        return _microseconds(self.remember)

    @cached_property
    def max_ahead_us(self) -> int:
        """Tolerance for clocks that are ahead, in microseconds."""
        return _microseconds(self.max_ahead)

    @cached_property
    def idle_us(self) -> int:
        """Silence before event time goes on with the clock, in microseconds."""
        return _microseconds(self.idle)

    def check_inputs(self, raw: bytes | msgspec.Raw) -> None:
        """Raises Rejected("invalid_inputs") unless they are what the contract says."""
        try:
            self._inputs_decoder.decode(raw)
        except msgspec.DecodeError as exc:
            raise Rejected("invalid_inputs", f"inputs: {exc}") from exc
        if self._inputs_renamed:
            self.decode_inputs(raw)

    def decode_inputs(self, raw: bytes | msgspec.Raw) -> dict[str, Any]:
        """Inputs as a dictionary of the contract's fields. Raises Rejected("invalid_inputs")."""
        read = msgspec.structs.asdict(_decode(self._inputs_decoder, raw, "invalid_inputs", "inputs"))
        return _by_name_of_today(read, self.inputs, "invalid_inputs", "inputs")

    def decode_values(self, raw: bytes | msgspec.Raw) -> dict[str, Any]:
        """An outcome's values, checked. Raises Rejected("invalid_values")."""
        read = msgspec.structs.asdict(_decode(self._values_decoder, raw, "invalid_values", "values"))
        return _by_name_of_today(read, self.outcome.values, "invalid_values", "values")

    def label_of(self, values: Mapping[str, Any]) -> str:
        """What checked values say: a label or, where the label is a sum, the number to add, as text.

        Raises Rejected("invalid_values") for values that say nothing, or something outside the contract.
        """
        text = self._text_of(values)
        if text is None:
            what = "label.expression is null" if self.label.field is None else f"values.{self.label.field} is missing"
            raise Rejected("invalid_values", f"{what}: the label comes from it")
        if self.label.take == "sum":
            return summand(self.label, text)
        if self.label.map is not None:
            if text not in self.label.map:
                what = "label.expression" if self.label.field is None else f"values.{self.label.field}"
                raise Rejected("invalid_values", f"{what} is '{text}'; label.map knows {sorted(self.label.map)}")
            text = self.label.map[text]
        if not self.output.accepts(text):
            raise Rejected("invalid_values", f"label '{text}' {self.output.refusal}")
        return text

    @cached_property
    def says(self) -> Callable[[bytes], str]:
        """What an outcome's values, as they were sent, say: `label_of`, quicker. Raises Rejected("invalid_values").

        Outcomes mostly repeat a few values, and each is asked about twice, when it is read and when it is joined.
        """
        return lru_cache(REMEMBERED_VALUES)(lambda raw: self.label_of(self.decode_values(raw)))

    @cached_property
    def expression(self) -> Node | None:
        """The tree of `label.expression`, if the label comes from one. Raises ContractError."""
        if self.label.expression is None:
            return None
        return parse(self.label.expression, self.field_types)

    @property
    def label_fields(self) -> set[str]:
        """The outcome values that the label comes from."""
        if self.label.field is not None:
            return {self.label.field}
        return _fields_of(self.expression) if self.expression is not None else set()

    @property
    def input_types(self) -> dict[str, str]:
        """The type of each input by its name."""
        return {name: field.type for name, field in self.inputs.items()}

    @property
    def field_types(self) -> dict[str, str]:
        """The type of each outcome value by its name."""
        return {name: field.type for name, field in self.outcome.values.items()}

    def prompt(self, inputs: Mapping[str, Any]) -> str:
        """The template alone."""
        return _filled(self.training.template, inputs)

    def render(self, inputs: Mapping[str, Any]) -> Text:
        """What a model reads: the template with each `{field}` replaced; what is missing says `unknown`.

        A pair where there is a second template; with completions a prompt and them.
        """
        first, second, written = self.training.template, self.training.second_template, self.training.completions
        behind = written if second is None else [second]
        filled = tuple(_filled(template, inputs) for template in (first, *behind))
        return filled if behind else filled[0]

    def render_recorded(self, raw: bytes) -> Text:
        """`render` of inputs as they were recorded, as JSON: under this version of the contract or one before it."""
        inputs: dict[str, Any] = msgspec.json.decode(raw)
        for name, field in self.inputs.items():
            for before in field.names_before:
                if inputs.get(name) is None:
                    inputs[name] = inputs.get(before)
        return self.render(inputs)

    @property
    def pair(self) -> Pair | None:
        """How a row's two texts become one vector; None where a row has one text."""
        if self.training.second_template is None:
            return None
        return "difference" if self.output.task == "ranking" else "comparison"

    def slices_of(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of the gate's slices that a row is in, one for each of their fields: `grade=C`."""
        fields = self.gate.slices.fields if self.gate.slices is not None else []
        return tuple(f"{name}={_as_text(inputs.get(name))[:_LONGEST_SLICE]}" for name in fields)

    @cached_property
    def _text_of(self) -> Callable[[Mapping[str, Any]], str | None]:
        if self.expression is not None:
            kind, evaluate = self.expression.type, evaluator(self.expression)
            return lambda values: label_text(evaluate(values), kind)
        field = self.label.field or ""
        is_number = self.outcome.values[field].type == "number"

        def text_of(values: Mapping[str, Any]) -> str | None:
            value = values.get(field)
            if value is None or isinstance(value, str):
                return value
            return str(value + 0.0 if is_number else value)  # which makes -0.0 positive

        return text_of

    @cached_property
    def _inputs_decoder(self) -> msgspec.json.Decoder[Any]:
        return _decoder(f"{self.stream} inputs", self.inputs)

    @cached_property
    def _inputs_renamed(self) -> bool:
        return any(field.was for field in self.inputs.values())

    @cached_property
    def _values_decoder(self) -> msgspec.json.Decoder[Any]:
        return _decoder(f"{self.stream} values", self.outcome.values)


def load_contract(path: Path) -> Contract:
    """Read and check one contract file. Raises ContractError with file, line where known, field, problem and fix."""
    try:
        text = path.read_text(encoding="utf-8")
        document = read_yaml(text)
    except OSError as exc:
        raise ContractError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ContractError(f"{path}: not valid YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(document, dict):
        raise ContractError(f"{path}: a contract is a mapping with the keys {', '.join(Contract.__struct_fields__)}")
    try:
        contract = msgspec.convert(document, Contract)
    except msgspec.ValidationError as exc:
        raise ContractError(f"{path}{line_of(text, str(exc))}: {exc}{hint(str(exc), Contract)}") from exc
    for field, problem in _inconsistencies(contract):
        raise ContractError(f"{path}{line_of(text, '$.' + field)}: {field}: {problem}")
    return contract


def load_contracts(folder: Path) -> dict[str, Contract]:
    """All `*.yaml` contracts of a folder by stream name. Raises ContractError, also for two files of one stream."""
    contracts: dict[str, Contract] = {}
    for path in sorted(folder.glob("*.yaml")):
        contract = load_contract(path)
        if contract.stream in contracts:
            raise ContractError(f"{path}: stream '{contract.stream}' has another contract in {folder}; keep one")
        contracts[contract.stream] = contract
    if not contracts:
        raise ContractError(
            f"{folder}: no contract (*.yaml) there; set `contracts` in accrual.toml or ACCRUAL_CONTRACTS"
        )
    return contracts


def _inconsistencies(contract: Contract) -> list[tuple[str, str]]:
    """What types cannot check: references between fields, durations, ranges."""
    found: list[tuple[str, str]] = []
    for name in ("horizon", "disorder", "remember", "max_ahead", "idle"):
        try:
            parse_duration(getattr(contract, name))
        except ValueError as exc:
            found.append((name, str(exc)))
    found += _mistaken_names("inputs", contract.inputs) + _mistaken_names("outcome.values", contract.outcome.values)
    found += _unhidable("inputs", contract.inputs) + _unhidable("outcome.values", contract.outcome.values)
    if contract.join is not None and contract.late == "revise":
        found.append(("late", "`revise` needs the prediction's id: with `join` the horizon says whose an outcome is"))
    found += output_mistakes(contract.output)
    found += inconsistencies(contract.label, contract.field_types, contract.output)
    if not found:
        found += [
            (f"outcome.values.{name}.was", "the label comes from it: it keeps its name, since the audit reads by it")
            for name in contract.label_fields
            if contract.outcome.values[name].was
        ]
        found += [
            (f"outcome.values.{name}.pii", "the label comes from it: hidden, it says nothing")
            for name in contract.label_fields
            if contract.outcome.values[name].pii
        ]
    if contract.on_expiry != CENSORED:
        named = msgspec.structs.replace(contract.output, open=False)  # a class that expiry alone gives is a mistake
        if contract.output.task == "text":
            found.append(("on_expiry", "a text that never came is `censored`: leave it out"))
        elif not named.accepts(contract.on_expiry):
            found.append(("on_expiry", f"'{contract.on_expiry}' is neither `censored` nor one of {named.wanted}"))
    if contract.quality is not None:
        found += mistakes(contract.quality, contract.input_types, contract.field_types, contract.output.classes)
        found += [
            ("quality.bounds", f"{bound.metric}: a {contract.output.task} has none: take the bound out")
            for bound in contract.quality.bounds
            if bound.metric in contract.output.unmeasured
        ]
    found += _template_mistakes(contract) + _training_mistakes(contract)
    return found + policy_mistakes(contract.training, contract.gate, contract.input_types)


def _template_mistakes(contract: Contract) -> list[tuple[str, str]]:
    """What a model reads."""
    found: list[tuple[str, str]] = []
    training, task = contract.training, contract.output.task
    templates = [("template", training.template), ("second_template", training.second_template)]
    for name, template in (*templates, *(("completions", template) for template in training.completions)):
        placeholders = _PLACEHOLDER.findall(template or "")
        found += [
            (f"training.{name}", f"{{{field}}} is not one of inputs ({', '.join(contract.inputs)})")
            for field in placeholders
            if field not in contract.inputs
        ]
        if template is not None and not placeholders:
            example = next(iter(contract.inputs), "text")
            found.append((f"training.{name}", f"names no input; write e.g. '{{{example}}}'"))
    is_pair, written = training.second_template is not None, COMPLETIONS.get(task, 0)
    if task == "ranking" and not is_pair:
        found.append(("training.second_template", "a ranking chooses between two texts: add the second one"))
    if is_pair and task not in ("ranking", "score"):
        found.append(("training.second_template", f"a {task} reads one text: put the second into training.template"))
    if len(training.completions) != written:
        needs = f"needs {written}: each text that is judged" if written else "has none: leave it out"
        found.append(("training.completions", f"a row of a {task} {needs}"))
    return found


def _training_mistakes(contract: Contract) -> list[tuple[str, str]]:
    """Which rows are learned from, and when."""
    training, inputs = contract.training, contract.input_types
    in_template = _PLACEHOLDER.findall(f"{training.template} {training.second_template} {training.completions}")
    found = trigger_mistakes(training.triggers, inputs, contract.quality is not None)
    for name in ("every", "cooldown"):
        duration = getattr(training.triggers, name)
        try:
            parse_duration(duration or "1d")
        except ValueError as exc:
            found.append((f"training.triggers.{name}", str(exc)))
    if training.control is not None:
        found += control_mistakes(training.control, inputs, in_template)
    found += [
        (f"training.{name}", f"`{value}` draws by the inputs in quality.slices: name some there")
        for name, value in (("replay_by", "slice"), ("prefer", "rare"))
        if getattr(training, name) == value and not (contract.quality and contract.quality.slices)
    ]
    if not contract.output.one_of_classes:
        found += [
            (f"training.{name}", f"`{getattr(training, name)}` needs one class a row; output.task is not that")
            for name, values in (("balance", ("sqrt", "equal")), ("prefer", ("uncertain",)), ("replay_by", ("label",)))
            if getattr(training, name) in values
        ]
    if contract.output.task == "text" and training.calibration not in ("auto", "none", "temperature"):
        found.append(("training.calibration", "a text has a temperature or none: write auto, temperature or none"))
    if contract.output.writes:
        if training.max_tokens <= contract.output.max_new_tokens:
            found.append(("training.max_tokens", "counts prompt and text: above output.max_new_tokens"))
        if (training.base_model or "minilm") == "minilm":
            found.append(("training.base_model", "texts need a model that writes: `smollm2`, a folder or a name"))
    if training.cohort == "ipw" and training.prefer != "newest":
        problem = f"`{training.prefer}` with `cohort: ipw`: its weights need a sample drawn at random"
        found.append(("training.prefer", problem))
    return found


def _fields_of(node: Node) -> set[str]:
    own = {str(node.value)} if node.op == "field" else set()
    return own.union(*(_fields_of(operand) for operand in node.operands))


def _mistaken_names(where: str, fields: Mapping[str, Field]) -> list[tuple[str, str]]:
    """Names that stand for two fields. Case does not tell names apart in SQL."""
    names = Counter(name.lower() for own, field in fields.items() for name in (own, *field.names_before))
    return [
        (f"{where}.{own}", f"'{name}' is the name of another field too, of today or before")
        for own, field in fields.items()
        for name in (own, *field.names_before)
        if names[name.lower()] > 1
    ]


def _unhidable(where: str, fields: Mapping[str, Field]) -> list[tuple[str, str]]:
    """Personal fields whose value, once hidden, would break the contract."""
    found: list[tuple[str, str]] = []
    for name, field in fields.items():
        if field.pii is None or (field.pii == "redact" and field.optional):
            continue
        length = len(REDACTED) if field.pii == "redact" else PSEUDONYM_LENGTH
        if field.type != "string":
            fix = " or `optional: true`, which is then sent as null" if field.pii == "redact" else ""
            found.append((f"{where}.{name}.pii", f"`{field.pii}` needs `type: string`{fix}"))
        elif field.max_length is not None and field.max_length < length:
            found.append((f"{where}.{name}.max_length", f"`pii: {field.pii}` sends {length} characters"))
    return found


def _microseconds(duration: str) -> int:
    return parse_duration(duration) // timedelta(microseconds=1)


def _decoder(name: str, fields: Mapping[str, Field]) -> msgspec.json.Decoder[Any]:
    """A decoder of checked fields; unknown extra fields are let through but not read.

    A field that was renamed may come by any of its names; that it comes at all is left to `_by_name_of_today`.
    """
    required = {n: f.annotation() for n, f in fields.items() if not (f.optional or f.was)}
    optional = {
        name: f.annotation() | None
        for own, f in fields.items()
        if f.optional or f.was
        for name in (own, *f.names_before)
    }
    struct = msgspec.defstruct(
        name.title().replace(" ", "").replace("-", ""),
        [*required.items(), *((n, t, None) for n, t in optional.items())],
        kw_only=True,
        frozen=True,
    )
    return msgspec.json.Decoder(struct)


def _decode(decoder: msgspec.json.Decoder[Any], raw: bytes | msgspec.Raw, reason: str, where: str) -> Any:
    """An instance of the decoder's struct. Raises Rejected with `reason`."""
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError as exc:
        raise Rejected(reason, f"{where}: {exc}") from exc


def _by_name_of_today(read: dict[str, Any], fields: Mapping[str, Field], reason: str, where: str) -> dict[str, Any]:
    """What was read, without names of before. Raises Rejected with `reason` for a field that came by none."""
    for name, field in fields.items():
        for before in field.names_before:
            value = read.pop(before)
            if read[name] is None:
                read[name] = value
        if read[name] is None and not field.optional:
            raise Rejected(reason, f"{where}: Object missing required field `{name}`")
    return read


def flattened(rows: Sequence[Text]) -> list[str]:
    """The texts of all rows, one behind the other."""
    return [text for row in rows for text in ((row,) if isinstance(row, str) else row)]


def shown(text: Text) -> str:
    """A row's text, for people: the two of a pair in one line."""
    return text if isinstance(text, str) else " | ".join(text)


def _filled(template: str, inputs: Mapping[str, Any]) -> str:
    return _PLACEHOLDER.sub(lambda m: _as_text(inputs.get(m[1])), template)


def _as_text(value: Any) -> str:
    if value is None or value == "":
        return "unknown"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
