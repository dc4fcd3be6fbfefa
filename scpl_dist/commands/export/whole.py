"""A model as one graph for `torch.export`: a batch of any size in, class scores out, in float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist.commands import saved
from scpl_dist.commands.saved import SavedRun
from scpl_dist.commands.trained import TrainedModel
from scpl_dist.data.preprocessing import describe


def opened(run_dir: Path, checkpoint: str | None, depth: int | None) -> tuple[SavedRun, TrainedModel]:
    """The model to export, cut behind `depth` blocks."""
    run = saved.find(run_dir, checkpoint, "cpu", plain=True)
    return run, TrainedModel(run, depth)


def example(run: SavedRun) -> Any:
    """Inputs that are like those of the run, a batch of 2."""
    return pytree.tree_map_only(
        Tensor, lambda leaf: torch.ones(leaf.shape, dtype=leaf.dtype), run.plan.shapes[0]
    )


def dynamic(inputs: Any) -> Any:
    """Sizes that may differ from those of the example: that of the batch, and the length of texts where it can."""
    batch, auto = torch.export.Dim("batch", min=1), torch.export.Dim.AUTO

    def sizes(leaf: Tensor) -> dict[int, Any]:
        return {0: batch} if leaf.dim() != 2 or leaf.is_floating_point() else {0: batch, 1: auto}

    return pytree.tree_map_only(Tensor, sizes, inputs)


def described(run: SavedRun) -> str:
    """Classes and preprocessing as JSON, for whoever uses the file."""
    made = run.preprocessing
    return json.dumps({"classes": run.classes, "preprocessing": None if made is None else describe(made)})


def failed(target: Path, error: Exception) -> ValueError:
    """What torch says of a model that it cannot make a graph of."""
    cause: BaseException = error
    while cause.__cause__ is not None:  # around it are advice and colours for whoever works on torch
        cause = cause.__cause__
    text = str(cause).strip().partition("\n")[0]
    return ValueError(
        f"{target}: torch.export cannot trace this model ({type(cause).__name__}: {text}); export safetensors instead"
    )
