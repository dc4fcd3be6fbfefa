"""Associated learning (ICLR 2022; Neural Computation 2021): blocks learn to predict a code of the label.

Block l has the network's layers f, a label encoder g, a bridge b and a decoder h. Data and label code both travel
forward, each without history, and neither path's loss touches the other:

    s_l = f_l(s_{l-1})      associated loss   MSE(b_l(s_l), t_l)          trains f and b
    t_l = g_l(t_{l-1})      autoencoder loss  AE(h_l(t_l), t_{l-1})       trains g and h       t_0 = one-hot label

An answer goes forward through all f, over the last bridge, and *back* through all decoders:

    stage 0   LOAD F0 SEND_F                           RECV_B DEC0 COUNT
    stage 1           RECV_F F1 SEND_F          RECV_B DEC1 SEND_B
    stage 2                     RECV_F F2 PRED2 DEC2 SEND_B
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods.base import LocalMethod, forward
from scpl_dist.methods.block import Carry, TrainableBlock
from scpl_dist.methods.heads import feature
from scpl_dist.methods.metrics import Metric
from scpl_dist.methods.schedule import Action, Kind, StageSpec
from scpl_dist.methods.task import Task
from scpl_dist.run.config import Association, Config, TaskSettings


class AssociatedUnit(TrainableBlock):
    """f with g, b and h; the first block's g is given the label, and its h gives class scores."""

    def __init__(self, block: nn.Module, width: int, settings: Association, task: Task, first: bool) -> None:
        entering = task.classes if first else settings.code
        activation = nn.Sigmoid if settings.activation == "sigmoid" else nn.Tanh
        hidden = [nn.Linear(width, settings.bridge), activation()] if settings.bridge else []
        bridge = [nn.Flatten(), *hidden, nn.Linear(settings.bridge or width, settings.code), activation()]
        linear = settings.activation == "tanh" and not first
        decoder = [nn.Linear(settings.code, entering), *([] if linear else [activation()])]
        heads = {
            "bridge": nn.Sequential(*bridge),
            "encoder": nn.Sequential(nn.Linear(entering, settings.code), activation()),
            "decoder": nn.Sequential(*decoder),
        }
        super().__init__(block, heads)
        self.task = task
        self.by_scores = settings.activation == "tanh" and first
        self.autoencoder_lr = settings.autoencoder_lr

    def forward(self, carry: Carry) -> Carry:
        """Both streams in training; the label's is not used to answer."""
        data = self.block(carry["data"])
        if not self.training:
            return {"data": data}
        return {"data": data, "code": self.heads["encoder"](carry["code"])}

    def embed(self, before: Carry, after: Carry) -> dict[str, Tensor]:
        """Bridge and decoder with what each should give."""
        back = {"back": self.heads["decoder"](after["code"]), "entered": before["code"]}
        return back | {"bridged": self.predict(after), "code": after["code"].detach()}

    def loss_terms(self, seen: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        associated = functional.mse_loss(seen["bridged"], seen["code"])
        if self.by_scores:
            return {"associated": associated, "autoencoder": self.task.loss(seen["back"], labels)}
        return {"associated": associated, "autoencoder": functional.mse_loss(seen["back"], seen["entered"])}

    def predict(self, after: Carry) -> Tensor:
        """What the code of the label should be, (N, code)."""
        code: Tensor = self.heads["bridge"](feature(self.block, after["data"]))
        return code

    def decode(self, answer: Tensor) -> Tensor:
        """The code one block before; for the first block, class scores."""
        code: Tensor = self.heads["decoder"](answer)
        return code

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The data's path and the label's path, with an optimizer each."""
        data = [*self.block.parameters(), *self.heads["bridge"].parameters()]
        label = [*self.heads["encoder"].parameters(), *self.heads["decoder"].parameters()]
        return [{"params": data}, {"params": label, "lr_scale": self.autoencoder_lr}]


class AssociatedLearning(LocalMethod):
    """Associated learning: see the module. Means over samples, so a batch may be split."""

    name = "al"
    reads = ("al.",)

    def __init__(self, config: Config, num_blocks: int, task: Task) -> None:
        super().__init__(config, num_blocks, task)
        if task.per_token:
            raise ValueError(
                'run.method = "al" and task.name = "lm": its label code is that of one class a sample; use early_exit, '
                "scpl, bp or gpipe"
            )
        usual = TaskSettings()
        for key in ("label_smoothing", "class_weights") if config.al.activation == "sigmoid" else ():
            value = getattr(config.task, key)
            if value != getattr(usual, key):
                raise ValueError(
                    f'task.{key} = {value!r} and al.activation = "sigmoid": which learns by squared errors, and not '
                    'by a cross-entropy; leave it out, or use al.activation = "tanh"'
                )

    def carry(self, inputs: Any, labels: Tensor) -> Carry:
        return {"data": inputs, "code": functional.one_hot(labels, self.task.classes).float()}

    def trainable(self, index: int, block: nn.Module, before: Any, after: Any) -> TrainableBlock:
        width = feature(block, after).shape[1:].numel()
        return AssociatedUnit(block, width, self.config.al, self.task, first=index == 0)

    def evaluate(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        """Forward through all stages and back through their decoders; the first stage counts."""
        for m in range(micro_batches):
            yield from forward(spec, m)
            if spec.last:
                yield Action(Kind.PREDICT, spec.blocks[-1], m)
            else:
                yield Action(Kind.RECV_B, micro_batch=m)
            for block in reversed(spec.blocks):
                yield Action(Kind.DECODE, block, m)
            yield Action(Kind.COUNT if spec.first else Kind.SEND_B, micro_batch=m)

    def scores(self, trainables: Mapping[int, TrainableBlock], block: int, carry: Carry) -> Tensor:
        """The shortcut: over the bridge of `block`, and back through the decoders before it."""
        answer = trainables[block].predict(carry)
        for index in range(block, -1, -1):
            answer = trainables[index].decode(answer)
        return answer

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, Metric]:
        """Without a loss: a decoder's answer is no score that a cross-entropy was made for."""
        return {name: found for name, found in super().metrics(scores, labels).items() if name != "loss"}

    def probabilities(self, scores: Tensor) -> Tensor:
        """The decoders' answer estimates a one-hot vector, so its entries serve as probabilities as they are."""
        return torch.clamp(scores, 0, 1)
