"""The weights as one plain state dict: ``blocks.<i>.<name>``, and ``heads.<i>.<name>`` of what learning added."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from scpl_dist.commands import saved
from scpl_dist.commands.answers import Exits
from scpl_dist.commands.export import in_one_step


def write(run_dir: Path, target: Path, checkpoint: str | None, depth: int | None) -> int:
    """All tensors, also those of heads that no answer needs."""
    run = saved.find(run_dir, checkpoint, "cpu")
    blocks = run.blocks()
    tensors = {
        f"{part}.{index}.{key}": tensor.detach().clone().contiguous()
        for index in range(Exits(run.plan, depth, None, f"--depth {depth}").depth)
        for part, module in (("blocks", blocks[index].block), ("heads", blocks[index].heads))
        for key, tensor in module.state_dict().items()
    }
    config = run.plan.config
    metadata = {"model": config.model.name, "method": config.run.method, "classes": json.dumps(run.classes)}
    with in_one_step(target) as path:
        try:
            save_file(tensors, path, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None
    return len(tensors)
