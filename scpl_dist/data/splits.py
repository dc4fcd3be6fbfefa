"""Completes a data set to three parts that keep the shares of the classes and never change.

A split is a property of the data set, not of a run: it does not depend on ``run.seed``, so the test samples
of two runs are the same. Rare classes are allowed: a class with one sample stays in the training part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from scpl_dist.data.source import SPLITS, Split
from scpl_dist.run.seeds import derive


@dataclass(frozen=True)
class Part:
    stored: Split  # the part that the data set has them in; "train" for those that were held out
    positions: torch.Tensor  # where in it they are, (N,) int64
    labels: torch.Tensor  # their classes, (N,) int64


def complete(
    labels: Mapping[str, torch.Tensor], classes: int, where: str, validation: float = 0.1
) -> dict[Split, Part]:
    """All three parts from the labels ``(N,)`` of "train" and perhaps of "validation" and "test".

    What the data set, called `where` in messages, does not have is held out of its training part: the share
    `validation`, and a fifth for the test. ValueError for an impossible share, and for a part with labels that no
    classifier can learn from.
    """
    if not 0 < validation <= 0.5:
        raise ValueError(
            f"data.args: validation = {validation!r}: give the share of the training part to hold out for "
            "validation, above 0 and at most 0.5"
        )
    shares = {"validation": validation, "test": 0.2}
    missing = [split for split in shares if split not in labels]
    held_out = stratified(labels["train"], [shares[split] for split in missing])
    taken = dict(zip(["train", *missing], held_out, strict=True))
    parts: dict[Split, Part] = {}
    for split in SPLITS:
        stored: Split = "train" if split in taken else split
        positions = taken.get(split, torch.arange(len(labels[stored])))
        parts[split] = Part(stored, positions, labels[stored][positions])
        if split in missing and not len(positions):
            raise ValueError(
                f"{where}: no class has {math.ceil(1 / shares[split])} samples, so no {split} part can be held out of "
                f"the training part: give it a {split} part, or more samples"
                + (", or a larger data.args.validation" if split == "validation" else "")
            )
        check_labels(parts[split].labels, classes, f"{where}, {split}")
    return parts


def stratified(labels: torch.Tensor, shares: Sequence[float]) -> list[torch.Tensor]:
    """Positions of each part, sorted: `shares`, rounded down within each class, after a part with what they leave."""
    parts = [[torch.empty(0, dtype=torch.int64)] for _ in range(len(shares) + 1)]
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(derive(0, "split", int(label)))
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [int(len(members) * share) for share in shares]
        *held_out, rest = members.split([*sizes, len(members) - sum(sizes)])
        for part, chosen in zip(parts, [rest, *held_out], strict=True):
            part.append(chosen)
    return [torch.cat(part).sort().values for part in parts]


def check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Refuse fewer than two classes, no samples, or a label outside ``0..classes-1``."""
    if classes < 2:
        raise ValueError(f"{where}: has {classes} class, a classifier needs at least 2; check the labels")
    if len(labels) == 0:
        raise ValueError(f"{where}: has no samples; check the files")
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        index = int(wrong[0])
        raise ValueError(
            f"{where}: sample {index} has label {int(labels[index])}; "
            f"{classes} classes have the labels 0 to {classes - 1}"
        )
