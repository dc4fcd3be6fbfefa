"""A model as a run has saved it; ``scpl-dist export`` writes its weights as one plain state dict."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from scpl_dist import data
from scpl_dist.data import DataSource
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from scpl_dist.storage import checkpoints
from scpl_dist.storage.parts import read_part
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.worker.updater import restore


def load(run_dir: Path, checkpoint: str | None = None) -> tuple[Plan, DataSource, dict[int, TrainableBlock]]:
    """Plan, data and all blocks of a run with the weights of a checkpoint, on the CPU, ready to answer."""
    if not (run_dir / "config.toml").is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.toml")
    configuration = config.load(run_dir / "config.toml")
    folder = checkpoints.find(run_dir, checkpoint)
    source = data.resolve(configuration, RunFolder(run_dir).labels())
    plan = Plan.plan(configuration, source.classes, source.example())
    trainables = plan.trainables(range(len(plan.parameters)))
    for index, trainable in trainables.items():
        restore(trainable, (), read_part(folder, index) | {"optimizers": []})
        trainable.eval()
    return plan, source, trainables


def export(run_dir: Path, target: Path, checkpoint: str | None = None) -> int:
    """What `scpl_dist.export` does."""
    plan, _, trainables = load(run_dir, checkpoint)
    tensors = {
        f"{part}.{index}.{key}": tensor.detach().clone().contiguous()
        for index, trainable in trainables.items()
        for part, module in (("blocks", trainable.block), ("heads", trainable.heads))
        for key, tensor in module.state_dict().items()
    }
    save_file(tensors, target, metadata={"model": plan.config.model.name, "method": plan.config.run.method})
    return len(tensors)
