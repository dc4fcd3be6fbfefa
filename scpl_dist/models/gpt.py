"""A small decoder of text: each token sees those before it, and the heads guess the next one.

    tokens (B, L) --> embedding --> layer --> layer | layer --> layer | ...      (B, L, width) between blocks

Layers add to a stream of residuals. Heads begin with LayerNorm ("norm", see `scpl_dist.methods.heads`), so the last
block needs no other end than the blocks before it. Positions are told by rotation of queries and keys
(arXiv 2104.09864), which has no weights and no greatest length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

_DEVIATION = 0.02  # of initial weights, as GPT-2 has it


def gpt(
    classes: int, width: int = 192, layers: int = 8, heads: int = 6, blocks: int = 4, dropout: float = 0.0
) -> list[Callable[[], nn.Module]]:
    """`layers` in `blocks` of as many each, the first of them with the embedding of `classes` tokens.

    ValueError: layers that cannot be shared by the blocks, or a width that cannot be by the heads.
    """
    if blocks < 1 or layers < blocks or layers % blocks:
        raise ValueError(
            f"model.args: blocks = {blocks} and layers = {layers}: give each block as many layers, at least one"
        )
    if heads < 1 or width < 2 * heads or width % (2 * heads):
        raise ValueError(
            f"model.args: width = {width} and heads = {heads}: each head takes an even number of columns; give a width "
            f"such as {max(1, heads) * 32}"
        )
    each = layers // blocks
    return [
        partial(_Decoder, classes if block == 0 else None, width, each, heads, dropout, layers)
        for block in range(blocks)
    ]


class _Decoder(nn.Sequential):
    """A block: some layers, after the embedding if there are tokens to embed."""

    predictor = classifier = "norm"

    def __init__(
        self, tokens: int | None, width: int, layers: int, heads: int, dropout: float, depth: int
    ) -> None:
        embedding = [] if tokens is None else [nn.Embedding(tokens, width)]
        super().__init__(*embedding, *(_Layer(width, heads, dropout) for _ in range(layers)))
        self.projector_widths = (width, width)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # What is added to the stream is smaller the more of it there is.
                share = (2 * depth) ** -0.5 if name.endswith(("output.weight", "contract.weight")) else 1.0
                nn.init.normal_(parameter, std=_DEVIATION * share)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class _Layer(nn.Module):
    """Attention to the tokens so far, then two linear layers, ``(B, L, width)`` to the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.project = nn.Linear(width, 3 * width)  # queries, keys, values
        self.output = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.dropout(self._attend(self.norms[0](stream)))
        added = self.contract(functional.gelu(self.expand(self.norms[1](stream))))
        summed: Tensor = stream + self.dropout(added)
        return summed

    def _attend(self, stream: Tensor) -> Tensor:
        batch, length, width = stream.shape
        parts = self.project(stream).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # (B, heads, L, columns) each
        read = functional.scaled_dot_product_attention(_turned(query), _turned(key), value, is_causal=True)
        attended: Tensor = self.output(read.transpose(1, 2).reshape(batch, length, width))
        return attended


def _turned(vectors: Tensor) -> Tensor:
    """Vectors ``(..., L, columns)``, each pair of columns turned by an angle that grows with the position."""
    length, half = vectors.shape[-2], vectors.shape[-1] // 2
    numbers = torch.arange(half, device=vectors.device, dtype=torch.float32)
    positions = torch.arange(length, device=vectors.device, dtype=torch.float32)
    angles = positions[:, None] * 10_000.0 ** (-numbers / half)
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
