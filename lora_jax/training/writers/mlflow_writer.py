"""MLflow: a server, or a database of its own in the run's directory."""

import time
from collections.abc import Mapping
from typing import Any

from lora_jax.extras import require
from lora_jax.training.writers.run_info import RunInfo, choose_store

_ID_TAG = "lora_jax.id"
_GROUP_TAG = "lora_jax.group"
_MAX_PARAMS = 100  # of one request


class MlflowWriter:
    """A run in MLflow, found again by a tag whenever the run goes on.

    What its store has already is not logged again, however the run was interrupted.
    """

    def __init__(self, info: RunInfo) -> None:
        from mlflow import MlflowClient

        uri = choose_store(info, "MLFLOW_TRACKING_URI", f"sqlite:///{info.store}/mlflow.db")
        if uri.startswith("sqlite:"):  # MLflow's light package comes without a database
            require("MLflow's local store", "mlflow", "sqlalchemy", "alembic")
        self._client = MlflowClient(uri)
        self._last: dict[str, int] = {}
        experiment = _find_experiment(self._client, info.project)
        run = self._find_run(experiment, info.id)
        self._is_new = run is None
        self._run_id = run or self._create(experiment, info)
        if not self._is_new:
            self._client.update_run(self._run_id, status="RUNNING")
        self.place = f"{uri}, experiment {info.project}, run {info.name}"

    def count_lines(self) -> None:
        """Returns None: a line is in its store when it was handed over."""

    def write(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Logs the values that the store does not have."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for name, value in values.items()
            if step > self._last_step(name)
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, is_success: bool) -> None:
        """Sets the status of the run."""
        self._client.set_terminated(self._run_id, status="FINISHED" if is_success else "KILLED")

    def _find_run(self, experiment: str, run_id: str) -> str | None:
        found = self._client.search_runs([experiment], f"tags.`{_ID_TAG}` = '{run_id}'")
        return found[0].info.run_id if found else None

    def _create(self, experiment: str, info: RunInfo) -> str:
        from mlflow.entities import Param

        tags = {_ID_TAG: info.id} | ({_GROUP_TAG: info.group} if info.group else {})
        run_id = self._client.create_run(experiment, run_name=info.name, tags=tags).info.run_id
        params = [Param(name, str(value)) for name, value in info.hyperparameters.items()]
        for begin in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run_id, params=params[begin : begin + _MAX_PARAMS])
        return run_id

    def _last_step(self, name: str) -> int:
        """Returns the last step of a metric that the store has; -1 for none."""
        if self._is_new:
            return -1
        if name not in self._last:
            history = self._client.get_metric_history(self._run_id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]


def _find_experiment(client: Any, name: str) -> str:
    """Returns the id of an experiment, which is made if there is none of that name."""
    from mlflow.exceptions import MlflowException

    if experiment := client.get_experiment_by_name(name):
        return experiment.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:  # another process has made it meanwhile
        if experiment := client.get_experiment_by_name(name):
            return experiment.experiment_id
        raise
