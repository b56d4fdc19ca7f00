"""Tracking: MLflow itself, in a database of its own, has what the ledger said; and when it is away training goes on."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from mlflow import MlflowClient

from accrual.config import Mlflow
from accrual.errors import ConfigError
from accrual.ledger import Evaluation, Run
from trainer.tracking import Tracking

AT = datetime(2026, 1, 5, tzinfo=UTC)
RUN = Run(
    run_id="desk@1-0a1b",
    stream="desk",
    version=1,
    parent="desk@0",
    windows=[1, 2],
    snapshot_id=7,
    rows_new=60,
    rows_replayed=30,
    seed=17,
    digest="d1",
    state="trained",
    reason="frozen",
    seconds=4.5,
    at=AT,
)


def evaluation(window: int, role: str, brier: float) -> Evaluation:
    return msgspec.convert(
        {
            "type": "evaluation",
            "stream": "desk",
            "run_id": RUN.run_id,
            "window": window,
            "model": "desk@1",
            "role": role,
            "rows": 60,
            "accuracy": 0.8,
            "auroc": None,
            "brier": brier,
            "log_loss": 0.5,
            "ece": 0.05,
            "coverage": 1.0,
            "at": AT,
        },
        Evaluation,
    )


def test_a_run_is_one_run_there_whoever_goes_on_with_it(tmp_path: Path) -> None:
    settings = Mlflow(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="ours")
    Tracking(settings).log(RUN)
    again = Tracking(settings)  # the trainer was killed, and started again
    again.log(RUN)
    again.log(
        msgspec.structs.replace(RUN, state="waiting"),
        [evaluation(3, "challenger", 0.3), evaluation(3, "champion", 0.4)],
    )
    again.log(msgspec.structs.replace(RUN, state="promoted", reason="earned it"), [evaluation(4, "challenger", 0.2)])

    client = MlflowClient(tracking_uri=settings.tracking_uri)
    experiment = client.get_experiment_by_name("ours/desk")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags["accrual.reason"] == "earned it" and found.data.params["windows"] == "1,2"
    history = client.get_metric_history(found.info.run_id, "challenger.brier")
    assert [(point.step, point.value) for point in history] == [(3, 0.3), (4, 0.2)]
    assert found.data.metrics["champion.brier"] == 0.4


def test_a_server_that_is_away_is_said_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING):
        Tracking(Mlflow(tracking_uri="http://127.0.0.1:1")).log(RUN)
    assert "did not take desk@1-0a1b" in caplog.text


@pytest.mark.parametrize("address", ["nonsense://there", "file:///tmp/mlruns"])
def test_an_address_that_mlflow_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match=f"mlflow.tracking_uri: {address}"):
        Tracking(Mlflow(tracking_uri=address))


def test_without_a_setting_nothing_is_logged_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Tracking(Mlflow()).log(RUN)
    assert list(tmp_path.iterdir()) == []
