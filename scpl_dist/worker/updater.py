"""Changes the weights of one block: its optimizers, all between a loss and an update, and what a checkpoint holds.

    gradients of one batch, or of several  ->  scaled back  ->  clipped  ->  optimizers  ->  average of the weights

The average is beside the weights, and takes their place while the block answers: training never sees it. What is no
parameter, such as BatchNorm's statistics, is not averaged: it is the newest in both.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.utils import _pytree as pytree

from scpl_dist.methods.arithmetic import on_gpu
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.run.config import Config
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.worker import optimizers


class Updater:
    """An optimizer for each parameter group of a block, as ``[optimizer]`` says; ValueError if it cannot be made."""

    def __init__(self, trainable: TrainableBlock, config: Config) -> None:
        self.trainable = trainable
        self.optimizers = optimizers.make(config.optimizer, trainable.parameter_groups())
        self._settings = config.optimizer
        held = {id(one) for optimizer in self.optimizers for one in _parameters(optimizer)}
        self._parameters = {name: one for name, one in trainable.named_parameters() if id(one) in held}
        # By name; empty before the first update, and where none is wanted.
        self._average: dict[str, Tensor] = {}
        self._exchanged = False  # the average is in the block, and the weights are in `_average`
        # The gradients of a loss are below what float16 can hold: it is scaled up, and they are scaled back.
        self.scaler: torch.amp.GradScaler | None = None
        if config.runtime.precision == "float16" and self.optimizers:
            self.scaler = torch.amp.GradScaler("cuda" if on_gpu(config) else "cpu")
        self.frozen = False

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def train(self, training: bool) -> bool:
        """Be ready to learn, or to answer, which averaged weights do where there are some; True if they took places."""
        self.trainable.train(training)
        if (
            self.frozen
        ):  # the whole still says whether it is trained or asked: that may decide what is passed on
            for part in self.trainable.children():
                part.eval()
        if self._exchanged is training and self._average:
            for name, average in self._average.items():
                weight = self._parameters[name].detach()
                before = weight.clone()
                weight.copy_(average)
                average.copy_(before)
            self._exchanged = not training
            return True
        return False

    def freeze(self) -> None:
        """Learn no more, from now on: what only learning needs is dropped."""
        self.drop_gradients()
        self.trainable.requires_grad_(False)
        self.optimizers, self.scaler, self.frozen = [], None, True
        self.train(self.trainable.training)

    def tensors(self) -> Iterator[Tensor]:
        """What it learns with: weights, gradients, states of optimizers, averages; not the buffers."""
        for parameter in self.trainable.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        states = [list(optimizer.state.values()) for optimizer in self.optimizers]
        yield from (leaf for leaf in pytree.tree_leaves(states) if isinstance(leaf, Tensor))
        yield from self._average.values()

    def norm(self) -> Tensor:
        """Length of the block's gradient as one vector, a scalar."""
        return get_total_norm([one.grad for one in self._parameters.values() if one.grad is not None])

    def step(
        self, schedule: Mapping[str, float], norm: Tensor | None = None, spoilt: Tensor | None = None
    ) -> None:
        """Update with the gradients that are there, and drop them.

        `schedule` has the learning rate "lr". `norm` is the length that ``optimizer.clip_norm`` limits, if not the
        block's own. If gradients were scaled, and too large for it, nothing changes but the scale, which is halved.
        Weights stay as they are if `spoilt`, a float32 scalar on the device, is 1 and not 0.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule["lr"] * group.get("lr_scale", 1.0)
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
        self._clip(norm)
        for optimizer in self.optimizers:
            with nullcontext() if spoilt is None else self._guarded(optimizer, spoilt):
                if self.scaler is None:
                    optimizer.step()
                else:
                    self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        self.drop_gradients()
        if self._settings.ema:
            self._move_average(self._settings.ema)
        self.trainable.updated()

    @contextmanager
    def _guarded(self, optimizer: torch.optim.Optimizer, spoilt: Tensor) -> Iterator[None]:
        """Let a step change no weight if it is spoilt, which only the device knows."""
        if self.scaler is None and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = spoilt  # type: ignore[attr-defined]  # torch's own guard, in its fused kernels
            yield
            return
        weights = [one.detach() for one in _parameters(optimizer)]
        before = [one.clone() for one in weights]
        yield
        for one, old in zip(weights, before, strict=True):
            torch.where(spoilt.bool(), old, one, out=one)

    def _clip(self, norm: Tensor | None) -> None:
        settings, parameters = self._settings, list(self._parameters.values())
        if settings.clip_value:
            clip_grad_value_(parameters, settings.clip_value)
        if settings.clip_norm:
            clip_grads_with_norm_(parameters, settings.clip_norm, self.norm() if norm is None else norm)

    def drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _move_average(self, decay: float) -> None:
        """As torch's AveragedModel: it begins with the weights after the first update."""
        weights = {name: one.detach() for name, one in self._parameters.items()}
        if self._average:
            averages = [self._average[name] for name in weights]
            torch._foreach_lerp_(averages, [*weights.values()], 1 - decay)
        else:
            self._average = {name: weight.clone() for name, weight in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, heads and optimizer state; the tensors are those in use, not copies.

        Gradients too, by name, if batches were accumulated and the update is still to come; and the average.
        """
        assert not self._exchanged
        state: dict[str, Any] = {
            "block": self.trainable.block.state_dict(),
            "heads": self.trainable.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        gradients = {name: one.grad for name, one in self._parameters.items() if one.grad is not None}
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        parts = {"gradients": gradients, "average": self._average, "scaler": scaler}
        return state | {key: part for key, part in parts.items() if part}

    def nonfinite(self, state: Mapping[str, Any]) -> str | None:
        return nonfinite(self.trainable, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put such a state back, whatever was done since; raises CheckpointError if it belongs to another model."""
        self._exchanged = False
        self.drop_gradients()
        # Where the block was frozen there are none: if it is to learn now, it begins with new ones.
        restore(self.trainable, self.optimizers if state["optimizers"] else (), state)
        for name, gradient in state.get("gradients", {}).items():
            one = self._parameters[name]
            one.grad = torch.empty_like(one).copy_(gradient)
        if self._settings.ema:
            averages = state.get("average", {})  # perhaps of a copy on the host
            self._average = {
                name: torch.empty_like(self._parameters[name].detach()).copy_(one)
                for name, one in averages.items()
            }
        if self.scaler is not None and "scaler" in state:  # not if the precision was another one until here
            self.scaler.load_state_dict(state["scaler"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def nonfinite(trainable: TrainableBlock, state: Mapping[str, Any]) -> str | None:
    """What in such a state is NaN or infinite, such as "weight 0.bias"; a buffer may be infinite, as masks are."""
    for part, module in (("block", trainable.block), ("heads", trainable.heads)):
        weights = {name for name, _ in module.named_parameters()}
        for name, value in state[part].items():
            if name in weights and not value.isfinite().all():
                return f"weight {name}"
            if isinstance(value, Tensor) and value.isnan().any():
                return f"buffer {name}"
    others = {
        "optimizers": "an optimizer's state",
        "gradients": "a gradient",
        "average": "an averaged weight",
    }
    if "scaler" in state:
        del others["gradients"]  # of a loss that is scaled: if it was too much, their update will be left out
    for part, name in others.items():
        leaves = pytree.tree_leaves(state.get(part))
        if not all(leaf.isfinite().all() for leaf in leaves if isinstance(leaf, Tensor)):
            return name
    return None


def restore(
    trainable: TrainableBlock, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]
) -> None:
    """Weights, heads and the state of optimizers; raises CheckpointError if they belong to another model."""
    try:
        trainable.block.load_state_dict(state["block"])
        trainable.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_with_settings(optimizer, saved))
            _order_like_parameters(optimizer)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint belongs to another model: {error}") from error


def _with_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state with the settings of this run, such as another weight_decay; torch would take the saved ones."""
    names = inspect.signature(type(optimizer)).parameters.keys() - {"params"}
    groups = [
        theirs | {key: value for key, value in ours.items() if key in names}
        for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    return saved | {"param_groups": groups}


def restore_answering(trainable: TrainableBlock, state: dict[str, Any]) -> None:
    """Take what answers of a state without optimizers: averaged weights where there are some; raises as `restore`."""
    restore(trainable, (), state)
    weights = dict(trainable.named_parameters())
    for name, average in state.get("average", {}).items():
        weights[name].detach().copy_(average)


def _order_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Fused kernels go through memory as it lies, and a checkpoint may be of the other ``runtime.memory_format``."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
