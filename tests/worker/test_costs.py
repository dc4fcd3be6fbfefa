from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.launch.preflight import preflight
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load

MODEL = """
from torch import nn

def heavy_first(classes):
    wide = nn.Sequential(nn.Flatten(), nn.Linear(256, 3000), nn.ReLU(), nn.Linear(3000, 3000), nn.Linear(3000, 16))
    return [wide] + [nn.Linear(16, 16) for _ in range(3)]
"""


@pytest.mark.parametrize("method", ["scpl", "bp"])
def test_a_heavy_block_gets_a_stage_of_its_own(method: str, tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    values = {
        "run.method": method,
        "model.name": f"{file}:heavy_first",
        "data.batch_size": 32,
        "metrics.port": 0,
        "pipeline.partition": "measured",
    }
    if method == "scpl":
        values["loss.projector"] = "l,16,16"
    plan = preflight(load(values=values))
    assert plan.config.pipeline.partition == [1, 3]
    assert [spec.blocks for spec in plan.specs] == [range(1), range(1, 4)]
    assert (
        preflight(load(values=values | {"pipeline.partition": "uniform"})).config.pipeline.partition
        == "uniform"
    )


def test_a_process_that_did_not_measure_says_what_to_do() -> None:
    import torch

    config = load(values={"pipeline.partition": "measured"})
    with pytest.raises(ValueError, match=r'"measured": all processes need the same counts.*--dry-run'):
        Plan.plan(config, 10, torch.zeros(2, 1, 16, 16))
