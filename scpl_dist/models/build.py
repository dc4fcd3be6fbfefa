"""Builds chosen blocks of a named model with weights that depend on the seed and the block alone.

A worker builds only its own blocks, and gets the weights that a process building the whole model would get.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from scpl_dist.models.trace import trace
from scpl_dist.run.imports import bind, blaming, checked
from scpl_dist.run.registry import Registry
from scpl_dist.run.seeds import derive, seed_python

MODELS = Registry(
    "models",
    "model.name",
    {
        "vgg_tiny": "scpl_dist.models.vgg:vgg_tiny",
        "gpt": "scpl_dist.models.gpt:gpt",
        "hf:": "scpl_dist.models.huggingface:model_function",
    },
)


def resolve(name: str, args: Mapping[str, Any]) -> Callable[[int], Any]:
    """The model function that ``model.name`` means with ``model.args``: a function of the number of classes."""
    function = MODELS.find(name)
    if ":" not in name:
        function = checked(function, "model.args")
    return bind(function, "model.args", args, 0, name=name)


def fitted(name: str, args: Mapping[str, Any], example: Any) -> Mapping[str, Any]:
    """``model.args`` with the channels of the data's images `example`, if the model takes them and they are not given.

    Only of a model with a plain name: what the arguments of others mean is not known here.
    """
    images = isinstance(example, torch.Tensor) and example.dim() == 4
    if ":" in name or not images or "channels" in args:
        return args
    takes = "channels" in inspect.signature(MODELS.find(name)).parameters
    return {**args, "channels": example.shape[1]} if takes else args


def build(
    name: str,
    args: Mapping[str, Any],
    classes: int,
    seed: int,
    blocks: Sequence[int] | None = None,
    device: str = "cpu",
) -> list[nn.Module]:
    """The wanted blocks of a model, None for all; entries that are functions are called for these only.

    On the device "meta" modules have no storage, and `trace` needs no memory and no time for them. ValueError for an
    unknown name or arguments, or if the function returns no list of blocks.
    """
    function = resolve(name, args)
    with torch.device(device), warnings.catch_warnings():
        # Weights that the function reads go nowhere on "meta", as they shall; torch has a line for each of them.
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter .* to a meta parameter")
        with blaming("model.name", name), seeded(seed, "weights"):
            returned = function(classes)
        entries = list(returned) if isinstance(returned, nn.ModuleList | nn.Sequential) else returned
        if not isinstance(entries, Sequence) or not entries:
            raise ValueError(
                f"model.name = {name!r}: returned {type(returned).__name__}, "
                "give a list of at least one nn.Module, or of functions that make one each"
            )
        wanted = range(len(entries)) if blocks is None else blocks
        return [_module(name, entries[index], index, seed) for index in wanted]


def outline(
    name: str, args: Mapping[str, Any], classes: int, example: Any
) -> tuple[list[nn.Module], list[Any]]:
    """All blocks of a model, on "meta" if they can be built there, and their output specs for the input `example`."""
    try:
        blocks = build(name, args, classes, 0, device="meta")
        return blocks, trace(blocks, example)
    except Exception:  # the model may need real tensors to be built; if it is really wrong, this raises again
        blocks = build(name, args, classes, 0)
        return blocks, trace(blocks, example)


def _module(name: str, entry: Any, index: int, seed: int) -> nn.Module:
    if callable(entry) and not isinstance(entry, nn.Module):
        with blaming("model.name", name), seeded(seed, "weights", index):
            entry = entry()
    if not isinstance(entry, nn.Module):
        raise ValueError(f"model.name = {name!r}: block {index} is {type(entry).__name__}, not nn.Module")
    return entry


def seed_generators(number: int) -> None:
    """Let torch on the CPU, numpy and ``random`` draw from this number on."""
    torch.default_generator.manual_seed(number)
    seed_python(number)


@contextmanager
def seeded(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """Seed the process's generators for code that takes none (initialisation, samples), and put their states back.

    They are torch's on the CPU, numpy's and that of ``random``. Other threads must not draw from them meanwhile.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_generators(derive(seed, purpose, *position))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
