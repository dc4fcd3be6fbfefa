"""Bidirectional LSTM and Transformer encoder for text: an embedding block, then one block for each layer.

A text travels as a dict of tensors, batch first: ``tokens`` ``(B, L, D)`` and ``mask`` ``(B, L)``, true at
words; the LSTM adds ``hidden`` and ``cell`` ``(B, 2, D)``, which start the next layer. Shapes are those of
the published code (arXiv 2602.00062), which has no positional encoding. There, the mean over a text and the
LSTM run over the padding, so that a result depends on the longest text in the batch; ``legacy=True`` does it
that way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Text = dict[str, torch.Tensor]

States = tuple[Tensor, Tensor]
"""Hidden and cell."""

_SATURATED = 1e4  # a gate is 0 or 1 then, in float32, whatever else enters it
INITIAL_DEVIATION = 0.1
"""Of word vectors that no file gives: with torch's 1, rare words would be noise louder than what the others learn."""


class _TextBlock(nn.Module):
    """What the blocks of both models share: how heads read their output."""

    def __init__(self, width: int, legacy: bool) -> None:
        super().__init__()
        self.projector_widths = (width, width)
        self.predictor = self.classifier = f"tanh,{width}"
        self.legacy = legacy

    def feature(self, output: Text) -> torch.Tensor:
        """Mean over the words of a text, ``(B, D)``."""
        mask = output["mask"][:, :, None]
        return (output["tokens"] * mask).sum(1) / mask.sum(1).clamp(min=1)


class Embedding(_TextBlock):
    """Word numbers ``(B, L)`` to vectors; 0 is padding, with the vector 0 and no gradient unless `legacy`."""

    def __init__(self, vocabulary: int, width: int, legacy: bool) -> None:
        super().__init__(width, legacy)
        self.vectors = nn.Embedding(vocabulary, width, padding_idx=None if legacy else 0)
        with torch.no_grad():
            self.vectors.weight.mul_(INITIAL_DEVIATION)

    def forward(self, words: torch.Tensor) -> Text:
        """Look the words up."""
        return {"tokens": self.vectors(words), "mask": words != 0}

    def feature(self, output: Text) -> torch.Tensor:
        """Mean over the words; over all positions if `legacy`."""
        return output["tokens"].mean(1) if self.legacy else super().feature(output)


class LSTMBlock(_TextBlock):
    """One bidirectional LSTM layer that starts from the final state of the layer before it."""

    def __init__(self, entering: int, width: int, legacy: bool) -> None:
        super().__init__(width, legacy)
        self.layer = nn.LSTM(entering, width, batch_first=True, bidirectional=True)

    def forward(self, text: Text) -> Text:
        """Run over the words of each text, ``(B, L, entering)`` to ``(B, L, 2 * width)``."""
        tokens, mask = text["tokens"], text["mask"]
        start = None
        if "hidden" in text:  # LSTM wants (2, B, D)
            start = (text["hidden"].transpose(0, 1).contiguous(), text["cell"].transpose(0, 1).contiguous())
        lengths = mask.sum(1).clamp(min=1)
        if self.legacy:
            outputs, (hidden, cell) = self.layer(tokens, start)
        elif (self.training and not tokens.is_cuda) or tokens.is_meta:
            outputs, hidden, cell = run_padded(self.layer, tokens, lengths, start)
        else:
            packed = pack_padded_sequence(tokens, lengths.cpu(), batch_first=True, enforce_sorted=False)
            ran, (hidden, cell) = self.layer(packed, start)
            outputs, _ = pad_packed_sequence(ran, batch_first=True, total_length=tokens.shape[1])
        states = {"hidden": hidden.transpose(0, 1).contiguous(), "cell": cell.transpose(0, 1).contiguous()}
        return {"tokens": outputs, "mask": mask, **states}

    def feature(self, output: Text) -> torch.Tensor:
        """Mean of the final states of both directions, ``(B, D)``."""
        return output["hidden"].mean(1)


def run_padded(
    layer: nn.LSTM, tokens: Tensor, lengths: Tensor, start: States | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``(B, L, 2 * width)``, hidden and cell states ``(2, B, width)`` of a bidirectional layer of one level.

    What it gives for a packed sequence, but on a CPU the backward pass of that takes ten times as long. Each direction
    runs forwards over all positions, the second one over the texts turned round within their lengths.
    """
    batch, length, _ = tokens.shape
    if start is None:
        start = (tokens.new_zeros(2, batch, layer.hidden_size),) * 2
    rows, positions = (
        torch.arange(batch, device=tokens.device)[:, None],
        torch.arange(length, device=tokens.device),
    )
    padding = positions >= lengths[:, None]
    turned = torch.where(padding, positions, lengths[:, None] - 1 - positions)
    entering = torch.cat(
        [tokens.masked_fill(padding[:, :, None], 0), padding[:, :, None].to(tokens.dtype)], dim=2
    )
    ahead, cell_ahead = _direction(layer, "l0", entering, (start[0][:1], start[1][:1]))
    back, cell_back = _direction(layer, "l0_reverse", entering[rows, turned], (start[0][1:], start[1][1:]))
    ends = rows[:, 0], lengths - 1
    outputs = torch.cat([ahead, back[rows, turned]], dim=2).masked_fill(padding[:, :, None], 0)
    return outputs, torch.stack([ahead[ends], back[ends]]), torch.cat([cell_ahead, cell_back])


def _direction(layer: nn.LSTM, suffix: str, entering: Tensor, start: States) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, L, width)`` and cell state ``(1, B, width)`` of one direction.

    The last column of `entering` is 1 at padding, and its weights there open the forget gate and close the input gate
    so far that the cell state stays what it is, to the bit.
    """
    weight, *others = (
        getattr(layer, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    column = weight.new_zeros(4, layer.hidden_size)  # gates: input, forget, cell, output
    column[0], column[1] = -_SATURATED, _SATURATED
    weights = [torch.cat([weight, column.reshape(-1, 1)], dim=1), *others]
    learns = torch.is_grad_enabled()
    # Without gradients some processors take a kernel that rounds otherwise, and what is computed again would differ.
    with torch.enable_grad():
        outputs, _, cell = torch.lstm(entering, start, weights, True, 1, 0.0, False, False, True)
    return (outputs, cell) if learns else (outputs.detach(), cell.detach())


class _LayerNorm(nn.Module):
    """Layer normalisation of the published code: unbiased deviation, and epsilon outside the root."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return self.weight * centred / (tokens.std(-1, keepdim=True) + 1e-6) + self.bias


class TransformerBlock(_TextBlock):
    """One pre-norm encoder layer and a final layer normalisation."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__(width, legacy=False)
        if width % heads:
            raise ValueError(f"model.args: width = {width} must be a multiple of heads = {heads}")
        self.heads = heads
        self.norms = nn.ModuleList([_LayerNorm(width) for _ in range(3)])
        self.project = nn.ModuleList([nn.Linear(width, width) for _ in range(4)])  # query, key, value, output
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, text: Text) -> Text:
        """Attend among the words of each text, ``(B, L, D)`` to ``(B, L, D)``."""
        tokens, mask = text["tokens"], text["mask"]
        tokens = tokens + self.dropout(self._attend(self.norms[0](tokens), mask))
        inner = F.relu(self.expand(self.norms[1](tokens)))
        tokens = tokens + self.dropout(self.contract(self.dropout(inner)))
        return {"tokens": self.norms[2](tokens), "mask": mask}

    def _attend(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = tokens.shape
        query, key, value = (
            part(tokens).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in list(self.project)[:3]
        )
        # A text without words attends to its padding: a row without any key would be a row of NaN.
        visible = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        rate = self.dropout.p if self.training else 0.0
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=rate)
        attended: torch.Tensor = self.project[3](read.transpose(1, 2).reshape(batch, length, width))
        return attended


def lstm(
    classes: int, vocabulary: int = 30000, width: int = 300, blocks: int = 4, legacy: bool = False
) -> list[Callable[[], nn.Module]]:
    """An embedding and ``blocks - 1`` bidirectional LSTM layers.

    Raises:
        ValueError: fewer than two blocks.
    """
    _check_blocks(blocks)
    layers = [
        partial(LSTMBlock, width if index == 1 else 2 * width, width, legacy) for index in range(1, blocks)
    ]
    return [partial(Embedding, vocabulary, width, legacy), *layers]


def transformer(
    classes: int,
    vocabulary: int = 30000,
    width: int = 300,
    hidden: int = 300,
    heads: int = 6,
    dropout: float = 0.1,
    blocks: int = 4,
    legacy: bool = False,
) -> list[Callable[[], nn.Module]]:
    """An embedding and ``blocks - 1`` Transformer encoder layers.

    Raises:
        ValueError: fewer than two blocks.
    """
    _check_blocks(blocks)
    layers = [partial(TransformerBlock, width, hidden, heads, dropout) for _ in range(1, blocks)]
    return [partial(Embedding, vocabulary, width, legacy), *layers]


def lstm_tiny(classes: int, vocabulary: int = 4000, legacy: bool = False) -> list[Callable[[], nn.Module]]:
    """`lstm` with 64 units and 3 blocks."""
    return lstm(classes, vocabulary, width=64, blocks=3, legacy=legacy)


def transformer_tiny(
    classes: int, vocabulary: int = 4000, legacy: bool = False
) -> list[Callable[[], nn.Module]]:
    """`transformer` with 64 units, 4 heads and 4 blocks."""
    return transformer(classes, vocabulary, width=64, hidden=128, heads=4, legacy=legacy)


def _check_blocks(blocks: int) -> None:
    if blocks < 2:
        raise ValueError(f"model.args: blocks = {blocks}: give at least 2, the embedding and one layer")
