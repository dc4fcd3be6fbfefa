"""Train your own blocks on your own data, one process a stage: ``python examples/own_model.py``."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import scpl_dist


def blocks(classes: int) -> list[nn.Module]:
    """Three blocks; each learns from a loss of its own."""
    return [nn.Sequential(nn.Linear(width, 64), nn.ReLU()) for width in (2, 64, 64)]


def data(root: str) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set: which of two interleaved spirals is a point on?"""

    def spirals(size: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        turn = 5 * torch.rand(size, generator=generator).sqrt()
        labels = torch.randint(0, 2, (size,), generator=generator)
        angle = turn + labels * torch.pi
        return torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1), labels

    return TensorDataset(*spirals(2000, seed=0)), TensorDataset(*spirals(500, seed=1))


if __name__ == "__main__":
    result = scpl_dist.train(
        blocks, data, {"pipeline.stages": 3, "run.epochs": 30, "data.augmentation": "none"}
    )
    print(f"test accuracy {result['accuracy_last']:.3f}")
