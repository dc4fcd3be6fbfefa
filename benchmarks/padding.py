"""What does padding cost an LSTM in training? ``python -m benchmarks.padding [--rounds 3]``.

A bidirectional layer over texts of many lengths, forwards and backwards on one thread, three ways in turn: as a padded
run (`scpl_dist_recipes.text_networks.run_padded`), as torch's packed sequence, which gives the same, and over the
padding as if it were words, as the published code does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from scpl_dist_recipes.text_networks import run_padded

SIZES = [(128, 30, 64), (128, 200, 64), (64, 200, 300)]
"""Texts in a batch, words of the longest one, width."""


def packed(layer: nn.LSTM, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Outputs of the layer over the words alone."""
    sequence = pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
    outputs, _ = pad_packed_sequence(layer(sequence)[0], batch_first=True, total_length=tokens.shape[1])
    return outputs


WAYS: dict[str, Callable[[nn.LSTM, Tensor, Tensor], Tensor]] = {
    "padded": lambda layer, tokens, lengths: run_padded(layer, tokens, lengths, None)[0],
    "packed": packed,
    "over the padding": lambda layer, tokens, lengths: layer(tokens)[0],
}


def seconds(way: Callable[[nn.LSTM, Tensor, Tensor], Tensor], layer: nn.LSTM, *batch: Tensor) -> float:
    """One step without its update."""
    begin = time.perf_counter()
    torch.autograd.backward(way(layer, *batch).square().mean())
    return time.perf_counter() - begin


def main() -> None:
    """Print texts a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for size, length, width in SIZES:
        layer = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        lengths = torch.randint(1, length + 1, (size,))
        lengths[0] = length
        batch = torch.randn(size, length, width, requires_grad=True), lengths
        taken: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(rounds + 1):  # the first one allocates
            for name, way in WAYS.items():
                duration = seconds(way, layer, *batch)
                if number:
                    taken[name].append(duration)
        rates = ", ".join(f"{name} {size / statistics.median(times):.0f}" for name, times in taken.items())
        print(f"batch {size}, up to {length} words, width {width}; texts a second: {rates}", flush=True)


if __name__ == "__main__":
    main()
