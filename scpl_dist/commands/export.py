"""``scpl-dist export``: the weights of a run as one plain state dict."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from scpl_dist.commands.saved import load


def export(run_dir: Path, target: Path, checkpoint: str | None = None) -> int:
    """Write all weights as one safetensors file with keys ``blocks.<i>.<name>`` and ``heads.<i>.<name>``.

    Returns the number of tensors.
    """
    plan, _, trainables = load(run_dir, checkpoint)
    tensors = {
        f"{part}.{index}.{key}": tensor.detach().clone().contiguous()
        for index, trainable in trainables.items()
        for part, module in (("blocks", trainable.block), ("heads", trainable.heads))
        for key, tensor in module.state_dict().items()
    }
    save_file(tensors, target, metadata={"model": plan.config.model.name, "method": plan.config.run.method})
    return len(tensors)
