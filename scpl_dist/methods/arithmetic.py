"""How a block computes: in which type, in which order of memory, compiled or not, and what it keeps to go backward.

    carry --> order of memory --> autocast ( block, compiled or in parts; heads ) --> objective, in float32

It is laid around the methods of a block when that is built (`arrange`), so training, evaluation and measurement have
the same, and names of weights stay. Each call of a block is an autocast of its own: the narrow copies of weights that
autocast keeps live for one block and one micro-batch, wherever stages begin.
"""

from __future__ import annotations

import functools
import logging
import math
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from scpl_dist.methods.block import Carry, TrainableBlock
from scpl_dist.run.config import Config

SHORT = 128  # tokens
_SWITCH = threading.RLock()
COMPILERS = ("g++", "c++", "clang++")
_VARIANTS = 64  # compiled versions of one block: training and evaluation, by sizes of the input
_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that use CUDA graphs


def check(config: Config, example: Any, local: bool) -> None:
    """ValueError if a model with inputs such as `example` cannot compute as the configuration says."""
    runtime = config.runtime
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    if runtime.memory_format == "channels_last" and all(len(shape) != 4 for shape in shapes):
        raise ValueError(
            'runtime.memory_format = "channels_last": is for images (batch, channels, height, width), and inputs of '
            f"{config.model.name!r} have {len(shapes[0])} dimensions; leave it out"
        )
    if runtime.precision == "float16" and not local:
        raise ValueError(
            f'runtime.precision = "float16": run.method = {config.run.method!r} would need one scale of the loss for '
            'all stages; use "bfloat16", which needs none'
        )
    if runtime.compile in _GRAPHS and not local:
        raise ValueError(
            f"runtime.compile = {runtime.compiled}: is for methods whose blocks learn alone; with run.method = "
            f"{config.run.method!r} other blocks compute between a block's forward and backward pass, which would "
            'write over what it keeps in a CUDA graph; use "default"'
        )
    if runtime.compile in _GRAPHS and runtime.offload != "off":
        raise ValueError(
            f'runtime.compile = {runtime.compiled}: runtime.offload = "{runtime.offload}" brings a block back to '
            'another place in memory each time, and a CUDA graph is for one place; use "default"'
        )
    some_on_cpu = not on_gpu(config) or "cpu" in runtime.devices
    if runtime.offload == "cpu" and some_on_cpu:
        raise ValueError(
            'runtime.offload = "cpu": a stage computes on the CPU, whose memory it would be put away in; use "disk"'
        )
    if runtime.compile and some_on_cpu and not any(map(shutil.which, COMPILERS)):
        raise ValueError(
            f"runtime.compile = {runtime.compiled}: torch compiles for the CPU with a C++ compiler, and there is no "
            f"{', '.join(COMPILERS)}; install one (Debian: apt-get install g++), or leave it out"
        )


def doubts(config: Config) -> Iterator[str]:
    """What this machine can do, but hardly as is meant."""
    if config.runtime.precision == "float16" and not on_gpu(config):
        yield 'runtime.precision = "float16": CPUs are many times slower with it than with "bfloat16" or "float32"'
    if config.runtime.precision != "bfloat16":
        return
    if on_gpu(config):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        # What other architectures are called is not known here: no warning for them.
        fast = (
            able["architecture"] != "x86_64" or able.get("avx512_bf16", False) or able.get("amx_bf16", False)
        )
    if not fast:
        yield 'runtime.precision = "bfloat16": is emulated on this machine, and slower than "float32"'


def on_gpu(config: Config) -> bool:
    """Whether a stage computes on a GPU; ask with `Config.at` for a certain one."""
    return set(config.runtime.devices) != {"cpu"} and torch.cuda.is_available()


def device(config: Config, local_rank: int = 0) -> torch.device:
    """Where the worker of this number on its host computes; ValueError for a GPU that is not here."""
    [wanted] = config.runtime.devices
    count = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    given = wanted.partition(":")[2]
    if int(given or 0) >= count:
        raise ValueError(
            f'runtime.device = "{wanted}": torch sees {count or "no"} GPU{"" if count == 1 else "s"} here; use "auto", '
            '"cpu", or one that is here'
        )
    return torch.device("cuda", int(given) if given else local_rank % count)


def settle(config: Config) -> None:
    """Set what holds for the whole process."""
    if config.runtime.tf32 and on_gpu(config):  # it would mean something to some CPUs, too
        torch.set_float32_matmul_precision("high")


def arrange(trainable: TrainableBlock, config: Config, local: bool) -> None:
    """Let a block compute as the configuration says.

    `local`: no gradients reach it from later blocks. Otherwise the schedule recomputes it as a whole.
    """
    runtime, block = config.runtime, trainable.block
    if config.pipeline.recompute and local:
        recompute_parts(block)
    if runtime.compile:
        from torch._inductor import config as inductor

        inductor.compile_threads = 1  # a worker starts no processes of its own, which would outlive it
        logging.getLogger("torch.utils.cpp_extension").setLevel(
            logging.ERROR
        )  # it misses CUDA, also for CPUs
        # Sizes are constants, so that what is compiled does not depend on which of them came first; and each block has
        # versions of its own, so that it does not depend on the other blocks of a stage.
        block.forward = torch.compile(  # type: ignore[call-overload]
            block.forward,
            mode="default" if runtime.compile is True else runtime.compile,
            dynamic=False,
            isolate_recompiles=True,
            recompile_limit=_VARIANTS,
        )
        if runtime.compile in _GRAPHS and on_gpu(config):
            replay(block)
    if runtime.memory_format == "channels_last":
        for parameter in trainable.parameters():
            parameter.data = _channels_last(parameter.data)
        _around(block, "forward", lambda forward: lambda carry: forward(_ordered(carry)))
    if runtime.precision != "float32":
        kind, dtype = "cuda" if on_gpu(config) else "cpu", getattr(torch, runtime.precision)
        _around(trainable, "forward", torch.autocast(kind, dtype))
        if kind == "cpu":
            _around(trainable, "forward", _short_attention_composed)
        for name in ("embed", "predict", "decode", "local_scores"):
            _around(trainable, name, lambda method: _in_float32(torch.autocast(kind, dtype)(method)))


def replay(block: nn.Module) -> None:
    """Let the results of a block whose forward and backward pass are CUDA graphs outlive the next graph.

    The graphs of all blocks of a device share their memory. So a graph may begin only when no backward pass is to
    come, as with local losses, and what is still needed then has to be a copy: outputs, which are sent on or are the
    next block's input, and gradients of weights, which may wait for other micro-batches.
    """
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.clone)  # type: ignore[no-untyped-call]

    def kept(forward: Callable[[Carry], Carry]) -> Callable[[Carry], Carry]:
        def call(carry: Carry) -> Carry:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return pytree.tree_map_only(Tensor, torch.clone, forward(carry))

        return call

    _around(block, "forward", kept)


def _around(module: nn.Module, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(module, name, wrap(getattr(module, name)))


def _short_attention_composed(forward: Callable[[Carry], Carry]) -> Callable[[Carry], Carry]:
    """Attention over few tokens as the formula says: on CPUs, torch's own kernel is two to three times slower there.

    Above some 180 tokens it is the other way round. Only where it is narrow: in float32 the two take the same time.
    """

    def call(carry: Carry) -> Carry:
        tensors = (leaf for leaf in pytree.tree_leaves(carry) if isinstance(leaf, Tensor))
        tokens = max((tensor.shape[1] for tensor in tensors if tensor.dim() == 3), default=0)
        with _composed(0 < tokens <= SHORT):
            return forward(carry)

    return call


@contextmanager
def _composed(wanted: bool) -> Iterator[None]:
    """Take the formula meanwhile. That is a switch of the process: threads that want it take turns."""
    if not wanted:
        yield
        return
    with _SWITCH, sdpa_kernel(SDPBackend.MATH):
        yield


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Objectives and metrics take what a head gives in float32."""

    def wide(leaf: Tensor) -> Tensor:
        return leaf.float() if leaf.dtype in (torch.bfloat16, torch.float16) else leaf

    return lambda *args: pytree.tree_map_only(Tensor, wide, method(*args))


def _ordered(carry: Carry) -> Carry:
    return pytree.tree_map_only(Tensor, _channels_last, carry)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def recompute_parts(block: nn.Module) -> bool:
    """Let the parts of a block keep only their inputs for the backward pass; False if it has no parts.

    Parts are runs of layers of an ``nn.Sequential``, about the square root of their number, and otherwise its
    children that have children.
    """
    if isinstance(block, nn.Sequential) and type(block).forward is nn.Sequential.forward and len(block) > 1:
        size = math.ceil(math.sqrt(len(block)))
        runs: list[list[nn.Module]] = [[]]
        for layer in block:
            # One that works in place would spoil the input that is kept for its run.
            if len(runs[-1]) >= size and not _in_place(layer):
                runs.append([])
            runs[-1].append(layer)
        block.forward = functools.partial(_through, runs)  # type: ignore[method-assign]
        return len(runs) > 1
    parts = list(_composite(block))
    if len(parts) == 1 and recompute_parts(parts[0]):
        return True
    for part in parts:
        part.forward = functools.partial(_again, part, part.forward)
    return bool(parts)


def _composite(block: nn.Module) -> Iterator[nn.Module]:
    for child in block.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _composite(child)
        elif next(child.children(), None) is not None:
            yield child


def _through(runs: Sequence[Sequence[nn.Module]], carry: Carry) -> Carry:
    for layers in runs:
        run = nn.Sequential(*layers)
        # The last one goes backward at once: nothing would be gained.
        plain = layers is runs[-1] or _in_place(layers[0])
        carry = run(carry) if plain else _again(run, run, carry)
    return carry


def _in_place(layer: nn.Module) -> bool:
    return bool(getattr(layer, "inplace", False))


def _again(module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a part whose activations are dropped and computed again."""
    if not torch.is_grad_enabled():
        return call(*args, **kwargs)
    found = functools.partial(_contexts, module)
    return checkpoint(call, *args, use_reentrant=False, context_fn=found, **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first pass of a part, and around its second one, which draws the same and leaves no trace.

    The numbers of torch are checkpoint's care.
    """
    composed = not torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]  # means CPUs, too
    return nullcontext(), _second(module, np.random.get_state(), random.getstate(), composed)


@contextmanager
def _second(module: nn.Module, numpy: Any, python: Any, composed: bool) -> Iterator[None]:
    now = np.random.get_state(), random.getstate()
    # Running statistics have seen this micro-batch already: let it update copies.
    owners = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    for owner, buffers in owners:
        owner._buffers.update({name: None if one is None else one.clone() for name, one in buffers.items()})
    np.random.set_state(numpy)
    random.setstate(python)
    try:
        with _composed(composed):
            yield
    finally:
        np.random.set_state(now[0])
        random.setstate(now[1])
        for owner, buffers in owners:
            owner._buffers.update(buffers)
