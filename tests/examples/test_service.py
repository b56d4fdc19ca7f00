"""The service's replay: order of event time, pace, and each answer under the name of the model that gave it."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from accrual import Distribution
from examples.case import Case
from examples.service import Progress, replay

START = datetime(2026, 1, 5, tzinfo=UTC)


class Desk:
    """Stands for feed, champion and recorder at once: a model that is replaced after so many batches."""

    failed = dropped = 0

    def __init__(self, replaced_after: int) -> None:
        self.batches = 0
        self.replaced_after = replaced_after
        self.said: list[tuple[str, datetime, str, Any]] = []

    def champion(self, _timeout: float | None = None) -> "Desk":
        return self

    @property
    def model(self) -> str:
        return "s@0" if self.batches <= self.replaced_after else "s@1"

    def predict(self, *arguments: Any, **names: Any) -> Any:
        if not names:
            self.batches += 1
            return [Distribution(label=row["text"], probabilities={}) for row in arguments[0]]
        inputs, output = arguments
        assert output.label == inputs["text"], "an answer went to another question"
        self.said.append(("prediction", names["predicted_at"], names["prediction_id"], names["model"]))
        return None

    def outcome(self, prediction_id: str, values: dict[str, Any], *, observed_at: datetime) -> None:
        self.said.append(("outcome", observed_at, prediction_id, values))


def cases() -> list[Case]:
    return [
        Case(
            START + timedelta(hours=n),
            {"text": str(n)},
            [(START + timedelta(hours=n, minutes=90), {"intent": str(n)})] if n % 5 else [],
        )
        for n in range(300)
    ]


def test_everything_is_sent_once_in_order_at_its_pace(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(replaced_after=3)
    started = time.monotonic()
    replay(cases(), timedelta(hours=2), desk, desk, seconds=1.0)  # type: ignore[arg-type]
    assert time.monotonic() - started >= 0.9
    moments = [moment for _, moment, _, _ in desk.said]
    assert moments == sorted(moments)
    asked = {i: model for kind, _, i, model in desk.said if kind == "prediction"}
    answered = [i for kind, _, i, _ in desk.said if kind == "outcome"]
    assert (len(asked), len(answered), len(set(answered))) == (300, 240, 240)
    assert set(answered) <= set(asked)
    models = list(asked.values())
    assert set(models) == {"s@0", "s@1"} and models == sorted(models), "a new champion serves what comes after it"
    last = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=Progress)
    assert (last.predictions, last.outcomes, last.total, last.lost) == (300, 240, 540, 0)
