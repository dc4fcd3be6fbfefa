"""Builds chosen blocks of a named model with weights that depend on the seed and the block alone.

A worker builds only its own blocks, and gets the weights that a process building the whole model would get.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from scpl_dist.models.trace import trace
from scpl_dist.run.imports import checked, load_object
from scpl_dist.run.seeds import derive

Entry = nn.Module | Callable[[], nn.Module]
ModelFunction = Callable[..., Sequence[Entry]]

_MODULES = {  # name of a built-in function -> module of this package
    "vgg_tiny": "vgg",
    "vgg8": "vgg",
    "resnet_tiny": "resnet",
    "resnet18": "resnet",
    "resnet18_3x3": "resnet",
    "lstm_tiny": "text",
    "lstm": "text",
    "transformer_tiny": "text",
    "transformer": "text",
}
_ZOO = "torchvision:"


def names() -> list[str]:
    """Names of the built-in models."""
    return list(_MODULES)


def resolve(name: str, args: Mapping[str, Any]) -> Callable[[int], list[Entry]]:
    """Find a model by name, without building anything.

    Args:
        name: a built-in name, ``torchvision:NAME``, ``package.module:function`` or
            ``path/to/file.py:function``.
        args: keyword arguments for the model function, ``model.args``.

    Returns:
        A function of the number of classes that returns the model's entries: modules or functions that make
        one.

    Raises:
        ValueError: unknown name, or arguments that the function does not take.
    """
    if name in _MODULES:
        module = importlib.import_module(f"scpl_dist.models.{_MODULES[name]}")
        function: ModelFunction = checked(getattr(module, name), "model.args")
    elif name.startswith(_ZOO):
        from scpl_dist.models.torchvision import model_function  # torchvision takes a second to import

        function = model_function(name.removeprefix(_ZOO))
    elif ":" in name:
        function = load_object(name, "model.name")
    else:
        raise ValueError(
            f"model.name = {name!r}: unknown; built in are {', '.join(names())}; "
            "others are torchvision:NAME, and your own as package.module:function or path/to/file.py:function"
        )
    try:
        inspect.signature(function).bind(0, **args)
    except TypeError as error:
        raise ValueError(f"model.args = {dict(args)!r}: {name} cannot be called with them: {error}") from None
    return partial(_entries, name, function, dict(args))


def build(
    name: str,
    args: Mapping[str, Any],
    classes: int,
    seed: int,
    blocks: Sequence[int] | None = None,
    device: str = "cpu",
) -> list[nn.Module]:
    """Build blocks of a model.

    Args:
        name: see `resolve`.
        args: see `resolve`.
        classes: number of classes of the data.
        seed: the run's seed.
        blocks: indices of the blocks wanted, None for all.
        device: "cpu", or "meta" for modules without storage, which `trace` needs no memory and no time for.

    Returns:
        The blocks, in the order of `blocks`. Entries that are functions are called for the wanted blocks
        only.

    Raises:
        ValueError: see `resolve`; the function returns no list of blocks; an index is outside the model.
    """
    function = resolve(name, args)
    with torch.device(device):
        with seeded(seed, "weights"):
            entries = function(classes)
        wanted = range(len(entries)) if blocks is None else blocks
        return [_module(name, entries, index, seed) for index in wanted]


def argument(name: str, args: Mapping[str, Any], parameter: str) -> Any:
    """Value that a model's function gets for one of its parameters.

    Returns:
        The value in `args`, else the default of the function; None if it has no such parameter.

    Raises:
        ValueError: see `resolve`.
    """
    call = resolve(name, args)
    assert isinstance(call, partial)
    function: ModelFunction = call.args[1]
    found = inspect.signature(function).parameters.get(parameter)
    return args.get(parameter, None if found is None else found.default)


def outline(
    name: str, args: Mapping[str, Any], classes: int, example: Any
) -> tuple[list[nn.Module], list[Any]]:
    """All blocks of a model and their output specs, without any weights where the model allows that.

    Args:
        name: see `resolve`.
        args: see `resolve`.
        classes: number of classes of the data.
        example: input of the first block for 2 samples; only shapes and dtypes are read.

    Returns:
        The blocks, on "meta" if they can be built there, to count parameters and read preferences; and the
        output spec of each, see `trace`.

    Raises:
        ValueError: see `build` and `trace`.
    """
    try:
        blocks = build(name, args, classes, 0, device="meta")
        return blocks, trace(blocks, example)
    except Exception:  # the model may need real tensors to be built; if it is really wrong, this raises again
        blocks = build(name, args, classes, 0)
        return blocks, trace(blocks, example)


def _module(name: str, entries: Sequence[Entry], index: int, seed: int) -> nn.Module:
    if not 0 <= index < len(entries):
        raise ValueError(f"block {index} does not exist: model.name = {name!r} has {len(entries)} blocks")
    entry = entries[index]
    if isinstance(entry, nn.Module):
        return entry
    with seeded(seed, "weights", index):
        module = entry()
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model.name = {name!r}: block {index} is built as {type(module).__name__}, not nn.Module"
        )
    return module


def _entries(name: str, function: ModelFunction, args: Mapping[str, Any], classes: int) -> list[Entry]:
    returned: object = function(classes, **args)
    if isinstance(returned, nn.ModuleList | nn.Sequential):
        returned = list(returned)
    if not isinstance(returned, Sequence) or not returned:
        raise ValueError(
            f"model.name = {name!r}: returned {type(returned).__name__}, "
            "give a list of at least one nn.Module, or of functions that make one each"
        )
    for index, entry in enumerate(returned):
        if not callable(entry):
            raise ValueError(f"model.name = {name!r}: block {index} is {type(entry).__name__}, not nn.Module")
    return list(returned)


@contextmanager
def seeded(seed: int, purpose: str, *position: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block and put its state back afterwards.

    For code that takes no generator: the initialisation of modules and, on a CPU, dropout.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive(seed, purpose, *position))
    try:
        yield
    finally:
        torch.set_rng_state(state)
