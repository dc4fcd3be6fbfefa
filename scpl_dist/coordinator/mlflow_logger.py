"""MLflow: one run of its own for a run, also when it is started again.

Server and experiment are those of MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, as for all of MLflow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from scpl_dist.storage.durable import write_text

_AT_ONCE = 100  # settings in a request, of which MLflow takes no more; of numbers it takes ten times as many
_EVERY_S = 1.0  # a request for each step would be too many for a server


class MLflow:
    def started(self, config: dict[str, Any], run_dir: Path, step: int) -> None:
        _make_database(mlflow.get_tracking_uri())
        self._client = MlflowClient()
        self._waiting: list[Metric] = []
        self._due = 0.0
        self._logged: dict[str, int] = {}
        file = run_dir / "mlflow.json"
        if file.exists():
            self._run = json.loads(file.read_text())["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            # Steps that are trained again come to the same, and MLflow cannot forget the first time.
            for name in self._client.get_run(self._run).data.metrics:
                history = self._client.get_metric_history(self._run, name)
                self._logged[name] = max(metric.step for metric in history)
            return
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default"))
        self._run = self._client.create_run(experiment, run_name=run_dir.resolve().name).info.run_id
        write_text(file, json.dumps({"run_id": self._run}))
        params = [Param(key, str(value)) for key, value in config.items()]
        for begin in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run, params=params[begin : begin + _AT_ONCE])

    def metrics(self, step: int, values: dict[str, float]) -> None:
        now = time.time()
        self._waiting += [
            Metric(name, value, int(now * 1000), step)
            for name, value in values.items()
            if step > self._logged.get(name, -1)
        ]
        if now >= self._due:
            self._send()
            self._due = time.time() + _EVERY_S

    def finished(self, code: int, result: dict[str, Any]) -> None:
        self._send()
        status = {0: "FINISHED", 1: "FAILED"}.get(code, "KILLED")
        self._client.set_terminated(self._run, status)

    def _send(self) -> None:
        for begin in range(0, len(self._waiting), 10 * _AT_ONCE):
            self._client.log_batch(self._run, metrics=self._waiting[begin : begin + 10 * _AT_ONCE])
        self._waiting = []

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        identity = found.experiment_id if found is not None else self._client.create_experiment(name)
        return str(identity)


def _make_database(uri: str) -> None:
    """Make a database of SQLite, as is MLflow's default, in a process that outlives this one if it has to.

    That takes up to half a minute, and half a database is one that MLflow never opens again.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        program = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1])"
        nothing = subprocess.DEVNULL
        subprocess.run(
            [sys.executable, "-c", program, uri], stdin=nothing, stderr=nothing, start_new_session=True
        )
