"""A trained model as a plain module, for programs: `scpl_dist.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scpl_dist.commands.answers import Exits
from scpl_dist.commands.predict import Prediction, predictions
from scpl_dist.commands.saved import SavedRun
from scpl_dist.methods.block import TrainableBlock


class TrainedModel(nn.Module):
    """Blocks 0 to ``depth - 1`` of a run, in evaluation mode; `scpl_dist.load` makes it.

    Its ``state_dict`` has the names of an export: ``blocks.<i>.<name>`` and ``heads.<i>.<name>``. Called with what the
    preprocessing gives, a pytree of tensors ``(N, ...)``, it returns class scores ``(N, classes)``; `predict` takes raw
    inputs. ``preprocessing.batch`` turns raw inputs into the first.
    """

    def __init__(self, run: SavedRun, depth: int | None = None) -> None:
        super().__init__()
        self._exits = Exits(run.plan, depth, None, f"--depth {depth}")
        self._run = run
        held = run.blocks(depth=self._exits.depth)
        self._trainables: dict[int, TrainableBlock] = {
            index: held[index] for index in range(self._exits.depth)
        }
        self.blocks = nn.ModuleList(own.block for own in self._trainables.values())
        self.heads = nn.ModuleList(own.heads for own in self._trainables.values())
        self.preprocessing = run.preprocessing
        self.eval()
        if self._exits.early:
            self._try()

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the scores."""
        return self._run.classes

    def forward(self, inputs: Any) -> Tensor:
        """Class scores ``(N, classes)`` of the last block that is there."""
        method = self._run.plan.method
        first = pytree.tree_leaves(inputs)[0]
        labels = torch.zeros(
            first.shape[0], dtype=torch.int64, device=first.device
        )  # no answer depends on them
        carry = method.carry(inputs, labels)
        for trainable in self._trainables.values():
            carry = trainable(carry)
        scores = method.scores(self._trainables, len(self._trainables) - 1, carry)
        if scores is None:
            raise self._exits.unanswered()
        return scores

    def predict(
        self, inputs: Any, exit_threshold: float | None = None, batch_size: int | None = None
    ) -> list[Prediction]:
        """Answers for raw inputs, in their order.

        Args:
            inputs: a sequence of image files, PIL images, arrays or tensors for a model of images, of texts for one of
                texts, and otherwise of what the data set gave, without labels. One text or path alone is taken as one.
            exit_threshold: let an input leave at the first block that gives one class at least this probability, in
                (0, 1]; None lets all go to the last block.
            batch_size: inputs that are computed at once; None takes that of the training.

        Raises:
            ValueError: an input that is none, or a threshold without a block that can answer.
        """
        if isinstance(inputs, str | Path):
            inputs = [inputs]
        exits = Exits(self._run.plan, self._exits.depth, exit_threshold, f"exit_threshold = {exit_threshold}")
        named = ((index, raw) for index, raw in enumerate(inputs))
        device = next(self.parameters()).device
        found = predictions(self._run, self._trainables, exits, named, device, batch_size)
        return [prediction for _, prediction in found]

    def _try(self) -> None:
        """ValueError if the block behind which the model was cut cannot answer."""

        def like(leaf: Tensor) -> Tensor:
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device=self._run.device)

        with torch.no_grad():
            self(pytree.tree_map_only(Tensor, like, self._run.plan.shapes[0]))
