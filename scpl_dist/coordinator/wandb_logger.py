"""Weights & Biases: one run of its own for a run, also when it is started again.

Project, team and whether it is online are those of WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE, as for all of it.
Steps that are trained again after a restart are there twice, with the same numbers.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import wandb

from scpl_dist.storage.durable import write_text


class WeightsAndBiases:
    def started(self, config: dict[str, Any], run_dir: Path, step: int) -> None:
        file = run_dir / "wandb.json"
        if not file.exists():
            write_text(file, json.dumps({"id": uuid.uuid4().hex[:8]}))
        self._run = wandb.init(
            id=json.loads(file.read_text())["id"],
            name=run_dir.resolve().name,
            dir=run_dir,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),  # the terminal is the coordinator's
        )
        self._run.config.update(config, allow_val_change=True)
        # Its own steps may only grow, but the stages of a run are at different ones.
        self._run.define_metric("*", step_metric="step")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finished(self, code: int, result: dict[str, Any]) -> None:
        numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
        self._run.summary.update({f"result/{key}": value for key, value in numbers.items()})
        self._run.finish(exit_code=code)
        wandb.teardown(code)  # its process ends before this one
