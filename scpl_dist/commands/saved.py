"""A model as a run has saved it; ``scpl-dist export`` writes its weights as one plain state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from scpl_dist import data
from scpl_dist.data import DataSource
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from scpl_dist.storage import checkpoints
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.parts import read_part
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.updater import nonfinite, restore_answering


def load(run_dir: Path, checkpoint: str | None = None) -> tuple[Plan, DataSource, dict[int, TrainableBlock]]:
    """Plan, data and all blocks of a run with the weights of a checkpoint, on the CPU, ready to answer."""
    RunFolder(run_dir).check()
    configuration = config.load(run_dir / "config.toml")
    found = checkpoints.find(run_dir, checkpoint)
    source = data.resolve(configuration, RunFolder(run_dir).labels())
    counts = data.counts(configuration, source)
    plan = Plan.plan(configuration, source.classes, source.example(), counts)
    trainables = plan.trainables(range(len(plan.parameters)))
    spoilt = _restore(trainables, found)
    if spoilt is not None:
        good = [each.name for each in checkpoints.steps(run_dir) if _is_sound(trainables, each)]
        fix = f"take --checkpoint {good[-1]}, the last that is finite" if good else "no other one is finite"
        raise CheckpointError(f"{found}: {spoilt} is NaN or infinite: {fix}")
    for trainable in trainables.values():
        trainable.eval()
    return plan, source, trainables


def _restore(trainables: Mapping[int, TrainableBlock], checkpoint: Path) -> str | None:
    """Take the weights of a checkpoint; returns what is NaN or infinite in them, such as "weight 0.bias of block 1"."""
    for index, trainable in trainables.items():
        state = read_part(checkpoint, index) | {"optimizers": [], "gradients": {}}
        restore_answering(trainable, state)
        name = nonfinite(trainable, state)
        if name is not None:
            return f"{name} of block {index}"
    return None


def _is_sound(trainables: Mapping[int, TrainableBlock], checkpoint: Path) -> bool:
    try:
        return _restore(trainables, checkpoint) is None
    except CheckpointError:
        return False


def export(run_dir: Path, target: Path, checkpoint: str | None = None) -> int:
    """What `scpl_dist.export` does."""
    if target.suffix != ".safetensors":
        fix = target.with_suffix(".safetensors")
        raise ValueError(f"{target}: export writes the format safetensors only; call the file {fix}")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}; make it first")
    plan, _, trainables = load(run_dir, checkpoint)
    tensors = {
        f"{part}.{index}.{key}": tensor.detach().clone().contiguous()
        for index, trainable in trainables.items()
        for part, module in (("blocks", trainable.block), ("heads", trainable.heads))
        for key, tensor in module.state_dict().items()
    }
    metadata = {"model": plan.config.model.name, "method": plan.config.run.method}
    try:
        save_file(tensors, target, metadata)
    except SafetensorError as error:
        raise ValueError(f"{target} cannot be written: {error}") from None
    return len(tensors)
