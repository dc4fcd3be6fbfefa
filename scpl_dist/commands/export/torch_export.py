"""A graph that ``torch.export.load`` reads and runs without the model's code."""

from __future__ import annotations

from pathlib import Path

import torch

from scpl_dist.commands.export import in_one_step, whole


def write(run_dir: Path, target: Path, checkpoint: str | None, depth: int | None) -> int:
    """``torch.export.load(target).module()`` maps inputs to scores; "preprocessing.json" beside it has the rest."""
    run, model = whole.opened(run_dir, checkpoint, depth)
    inputs = whole.example(run)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (inputs,), dynamic_shapes=(whole.dynamic(inputs),))
    except Exception as error:  # torch has many kinds for what it cannot trace
        raise whole.failed(target, error) from error
    with in_one_step(target) as path:
        torch.export.save(program, path, extra_files={"preprocessing.json": whole.described(run)})
    return len(program.state_dict)
