"""ONNX, for onnxruntime and others."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from scpl_dist.commands.export import in_one_step, whole

OPSET = 20
_LARGE = 2**30  # bytes of tensors from which on they are a file of their own: one file has at most 2 GB


def write(run_dir: Path, target: Path, checkpoint: str | None, depth: int | None) -> int:
    """Inputs are called ``input``, or ``input_0`` and so on, as many as there are tensors; the output ``scores``."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f'--format onnx needs {" and ".join(missing)}: pip install "scpl_dist[onnx]"')
    run, model = whole.opened(run_dir, checkpoint, depth)
    inputs = whole.example(run)
    number = len(pytree.tree_leaves(inputs))
    names = ["input"] if number == 1 else [f"input_{index}" for index in range(number)]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch's own use of what it is about to remove
            program = torch.onnx.export(
                model,
                kwargs={
                    "inputs": inputs
                },  # a last argument that is a dict, as of texts, would be taken for names
                input_names=names,
                output_names=["scores"],
                dynamic_shapes={"inputs": whole.dynamic(inputs)},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch has many kinds for what it cannot trace
        raise whole.failed(target, error) from error
    assert program is not None
    program.model.metadata_props["scpl_dist"] = whole.described(run)
    state = model.state_dict()
    with in_one_step(target) as path:
        program.save(path, external_data=sum(tensor.nbytes for tensor in state.values()) > _LARGE)
    return len(program.model.graph.initializers)
