"""Tracking: what the ledger says is also logged to MLflow, if `mlflow.tracking_uri` names a server or a database.

A run there is a run here, found again by its id, so a trainer that was killed goes on with the one it began. The ledger
stays the record: a server that is away costs a warning, and what it missed is not told again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accrual.config import Mlflow
from accrual.errors import ConfigError, NotHere
from accrual.ledger import Evaluation, Run

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

_METRICS = (
    "accuracy",
    "auroc",
    "rank_correlation",
    "brier",
    "log_loss",
    "ece",
    "calibration_error",
    "coverage",
    "e_value",
)
_ENDED = {"promoted": "FINISHED", "rejected": "FINISHED", "failed": "FAILED"}
_RUN_ID = "accrual.run_id"
# MLflow's own: eight tries of two minutes each, in which no cycle goes on. What is set in the environment holds.
_NOT_LONG = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracking:
    """Logs runs and evaluations; one MLflow experiment for each stream, `<experiment>/<stream>`."""

    def __init__(self, settings: Mlflow) -> None:
        """Raises NotHere when MLflow is configured and not installed, ConfigError when it cannot use the address."""
        self._client: MlflowClient | None = None
        self._settings = settings
        if settings.tracking_uri:
            try:
                from mlflow import MlflowClient
                from mlflow.exceptions import MlflowException
            except ModuleNotFoundError as exc:
                raise NotHere(
                    "mlflow.tracking_uri is set, and MLflow is missing: pip install 'accrual[mlflow]'"
                ) from exc
            for name, value in _NOT_LONG.items():
                os.environ.setdefault(name, value)
            try:
                self._client = MlflowClient(tracking_uri=settings.tracking_uri)
            except (MlflowException, OSError) as exc:
                raise ConfigError(f"mlflow.tracking_uri: {settings.tracking_uri}: {exc}") from exc

    def log(self, run: Run, evaluations: Sequence[Evaluation] = ()) -> None:
        """Log a run as it is now, and what was measured of its model. Never raises for what MLflow does."""
        if self._client is None:
            return
        from mlflow.exceptions import MlflowException

        try:
            self._log(self._client, run, evaluations)
        except (MlflowException, OSError) as exc:
            log.warning("MLflow at %s did not take %s: %s", self._settings.tracking_uri, run.run_id, exc)

    def _log(self, client: MlflowClient, run: Run, evaluations: Sequence[Evaluation]) -> None:
        own = self._run(client, run)
        for key, value in {"state": run.state, "reason": run.reason, "bundle": run.digest or ""}.items():
            client.set_tag(own, f"accrual.{key}", value)
        client.log_metric(own, "seconds", run.seconds)
        if run.retention is not None:
            client.log_metric(own, "retention", run.retention)
        for evaluation in evaluations:
            for name in _METRICS:
                if (value := getattr(evaluation, name)) is not None:
                    client.log_metric(own, f"{evaluation.role}.{name}", float(value), step=evaluation.window)
        if run.state in _ENDED:
            client.set_terminated(own, _ENDED[run.state])

    def _run(self, client: MlflowClient, run: Run) -> str:
        """The id in MLflow of a run, begun there if it is new."""
        name = f"{self._settings.experiment}/{run.stream}"
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        found = client.search_runs([experiment_id], filter_string=f"tags.`{_RUN_ID}` = '{run.run_id}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        begun = client.create_run(experiment_id, run_name=run.model, tags={_RUN_ID: run.run_id})
        params: dict[str, Any] = {
            "parent": run.parent,
            "windows": ",".join(map(str, run.windows)),
            "snapshot_id": run.snapshot_id,
            "rows_new": run.rows_new,
            "rows_replayed": run.rows_replayed,
            "seed": run.seed,
        }
        for key, value in params.items():
            client.log_param(begun.info.run_id, key, value)
        return str(begun.info.run_id)
