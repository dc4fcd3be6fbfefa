"""A folder as transformers has them: configuration, weights, and the tokeniser of the run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scpl_dist.commands import saved
from scpl_dist.commands.export import in_one_step
from scpl_dist.models.huggingface import Block


def write(run_dir: Path, target: Path, checkpoint: str | None, depth: int | None) -> int:
    """``AutoModel...from_pretrained(target)`` loads it, and its logits are the scores of the run."""
    run = saved.find(run_dir, checkpoint, "cpu", plain=True)
    name = run.plan.config.model.name
    blocks = run.blocks()
    modules = [trainable.block for trainable in blocks.values()]
    own = [module for module in modules if isinstance(module, Block)]
    if len(own) < len(modules):
        raise ValueError(
            f"--format hf writes models of Hugging Face (hf:PATH_OR_NAME), and this is {name!r}: take --format "
            "safetensors"
        )
    if depth is not None and depth < len(own):
        raise ValueError(
            f"--depth {depth} and --format hf: transformers has the whole model; take --format onnx"
        )
    heads = blocks[len(own) - 1].heads
    if "predictor" not in heads:
        raise ValueError(
            f"--format hf: with the method {run.plan.config.run.method} the model's own head is not trained; take "
            "--format safetensors"
        )
    predictor = heads["predictor"].layers
    assert isinstance(predictor, nn.Module)
    model = own[0].whole.joined(own, predictor)
    if own[0].whole.head == "classes":
        model.config.id2label = dict(enumerate(run.classes))
        model.config.label2id = {label: number for number, label in enumerate(run.classes)}
    with in_one_step(target) as path:
        model.save_pretrained(path)
        if run.preprocessing is not None:
            run.preprocessing.save(path)
    return len(model.state_dict())
