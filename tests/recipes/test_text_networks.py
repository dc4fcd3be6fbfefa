"""Text models compute what torch's own layers compute, and padding changes nothing unless asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from scpl_dist import models
from scpl_dist.methods.heads import Predictor, Projector, feature
from scpl_dist_recipes.text_networks import Embedding, LSTMBlock, Text, TransformerBlock, run_padded

WORDS = torch.tensor([[5, 3, 8, 2, 9], [7, 7, 0, 0, 0], [1, 4, 6, 0, 0]])


def run(blocks: list[nn.Module], words: torch.Tensor) -> list[torch.Tensor]:
    """Features of all blocks in evaluation mode."""
    read, value = [], words
    with torch.no_grad():
        for block in blocks:
            value = block.eval()(value)
            read.append(feature(block, value))
    return read


def parameters(blocks: list[nn.Module]) -> list[int]:
    return [sum(weight.numel() for weight in block.parameters()) for block in blocks]


def test_paper_sizes() -> None:
    words = torch.zeros(2, 7, dtype=torch.int64)
    blocks, specs = models.outline("lstm", {}, 4, words)
    assert [round(count / 1e6, 2) for count in parameters(blocks)] == [9.0, 1.44, 2.16, 2.16]
    assert specs[1]["tokens"].shape == (2, 7, 600)
    assert specs[1]["hidden"].shape == specs[1]["cell"].shape == (2, 2, 300)
    blocks, specs = models.outline("transformer", {}, 4, words)
    assert specs[3]["tokens"].shape == (2, 7, 300)
    assert parameters(blocks)[1:] == [6 * (300 * 300 + 300) + 3 * 600] * 3


@pytest.mark.parametrize("name", ["lstm", "transformer", "lstm_tiny", "transformer_tiny"])
def test_heads_fit_every_block(name: str) -> None:
    args = {"vocabulary": 50}
    width = 64 if "tiny" in name else 300
    blocks, specs = models.outline(name, args, 4, WORDS)
    real = models.build(name, args, 4, seed=0)
    for index, read in enumerate(run(real, WORDS)):
        assert read.shape == (3, width)
        assert Projector("m", blocks[index], specs[index])(read).shape == (3, width)
        assert Projector("i", blocks[index], specs[index])(read).shape == (3, width)
    predictor = Predictor(blocks[-1], specs[-1], 4)
    assert [type(part) for part in predictor.layers.children()] == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("name", ["lstm_tiny", "transformer_tiny"])
def test_padding_changes_nothing(name: str) -> None:
    blocks = models.build(name, {"vocabulary": 20}, 4, seed=0)
    together = run(blocks, WORDS)
    for row, length in [(0, 5), (1, 2), (2, 3)]:
        alone = run(blocks, WORDS[row : row + 1, :length])
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[row : row + 1], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm_tiny", "transformer_tiny"])
def test_legacy_reads_the_padding_as_the_published_code_does(name: str) -> None:
    blocks = models.build(name, {"vocabulary": 20, "legacy": True}, 4, seed=0)
    read = run(blocks, WORDS)
    vectors = next(iter(blocks[0].parameters()))
    torch.testing.assert_close(read[0], vectors[WORDS].mean(1))
    alone = run(blocks, WORDS[1:2, :2])
    assert not torch.allclose(read[0][1], alone[0][0], atol=1e-3)
    if name == "lstm_tiny":
        layer = blocks[1].layer
        assert isinstance(layer, nn.LSTM)
        _, (hidden, _) = layer(vectors[WORDS])
        torch.testing.assert_close(read[1], (hidden[0] + hidden[1]) / 2)


def test_embedding_feature_is_the_mean_over_words() -> None:
    block = Embedding(20, 6, legacy=False)
    output = block(WORDS)
    expected = torch.stack([block.vectors(row[row != 0]).mean(0) for row in WORDS])
    torch.testing.assert_close(block.feature(output), expected)
    (gradient,) = torch.autograd.grad(block.feature(output).sum(), block.vectors.weight)
    assert not gradient[0].any()
    assert gradient[5].any()


def test_lstm_layers_start_from_the_state_before_them() -> None:
    first, second = LSTMBlock(6, 4, legacy=False), LSTMBlock(8, 4, legacy=False)
    tokens = torch.randn(3, 5, 6)
    mask = WORDS != 0
    lower = first({"tokens": tokens, "mask": mask})
    upper = second(lower)
    for row, length in enumerate(mask.sum(1).tolist()):
        outputs, (hidden, cell) = first.layer(tokens[row : row + 1, :length])
        torch.testing.assert_close(lower["hidden"][row], hidden[:, 0])
        outputs, (hidden, cell) = second.layer(outputs, (hidden, cell))
        torch.testing.assert_close(upper["tokens"][row, :length], outputs[0])
        torch.testing.assert_close(upper["cell"][row], cell[:, 0])
        torch.testing.assert_close(second.feature(upper)[row], (hidden[0, 0] + hidden[1, 0]) / 2)
    assert not upper["tokens"][1, 2:].any()


@pytest.mark.parametrize(("kind", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("begun", [True, False])
def test_a_padded_run_is_a_packed_one(kind: torch.dtype, rtol: float, begun: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(6, 5, batch_first=True, bidirectional=True, dtype=kind)
    lengths = torch.tensor([7, 1, 4, 7, 3])

    def results(packed: bool) -> list[torch.Tensor]:
        """Outputs, states, and gradients of everything that enters."""
        generator = torch.Generator().manual_seed(1)
        tokens, hidden, cell, to_outputs, to_hidden, to_cell = (
            torch.randn(shape, generator=generator, dtype=kind)
            for shape in [(5, 8, 6), (2, 5, 5), (2, 5, 5), (5, 8, 10), (2, 5, 5), (2, 5, 5)]
        )
        start = (hidden.requires_grad_(), cell.requires_grad_()) if begun else None
        entering = [tokens.requires_grad_(), *(start or ()), *layer.parameters()]
        if packed:
            sequence = pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False)
            ran, states = layer(sequence, start)
            leaving = [pad_packed_sequence(ran, batch_first=True, total_length=8)[0], *states]
        else:
            leaving = list(run_padded(layer, tokens, lengths, start))
        return leaving + list(torch.autograd.grad(leaving, entering, [to_outputs, to_hidden, to_cell]))

    for found, wanted in zip(results(packed=False), results(packed=True), strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 10)


def test_a_padded_run_without_gradients_has_the_same_bits() -> None:
    """Of pipelines that compute a block again for its backward pass."""
    layer = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
    tokens, lengths = torch.randn(3, 8, 6), torch.tensor([8, 2, 5])
    with torch.no_grad():
        first = run_padded(layer, tokens, lengths, None)
    assert all(map(torch.equal, first, run_padded(layer, tokens, lengths, None)))


class _PublishedNorm(nn.Module):
    """The published normalisation, written another way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mean = tokens.sum(-1, keepdim=True) / self.width
        variance = ((tokens - mean) ** 2).sum(-1, keepdim=True) / (self.width - 1)
        return (tokens - mean) / (variance.sqrt() + 1e-6)


def test_transformer_block_is_torchs_pre_norm_encoder_layer() -> None:
    block = TransformerBlock(12, 24, 3, dropout=0.0)
    oracle = nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True, norm_first=True)
    oracle.norm1 = oracle.norm2 = _PublishedNorm(12)  # type: ignore[assignment]
    query, key, value, output = block.project
    with torch.no_grad():
        for part in (query, key, value, output, block.expand, block.contract):
            part.bias.normal_()  # type: ignore[operator]
        joined = {
            name: torch.cat([getattr(p, name) for p in (query, key, value)]) for name in ("weight", "bias")
        }
        oracle.self_attn.in_proj_weight.copy_(joined["weight"])
        oracle.self_attn.in_proj_bias.copy_(joined["bias"])
        oracle.self_attn.out_proj.load_state_dict(output.state_dict())
        oracle.linear1.load_state_dict(block.expand.state_dict())
        oracle.linear2.load_state_dict(block.contract.state_dict())
    tokens, mask = torch.randn(3, 5, 12), WORDS != 0
    expected = _PublishedNorm(12)(oracle(tokens, src_key_padding_mask=~mask))
    computed = block({"tokens": tokens, "mask": mask})["tokens"]
    torch.testing.assert_close(computed[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_only() -> None:
    block = TransformerBlock(12, 24, 3, dropout=0.5)
    text: Text = {"tokens": torch.randn(3, 5, 12), "mask": WORDS != 0}
    assert not torch.equal(block(text)["tokens"], block(text)["tokens"])
    block.eval()
    assert torch.equal(block(text)["tokens"], block(text)["tokens"])


@pytest.mark.parametrize("name", ["lstm_tiny", "transformer_tiny"])
def test_a_text_without_words_stays_finite(name: str) -> None:
    words = WORDS.clone()
    words[1] = 0
    for read in run(models.build(name, {"vocabulary": 20}, 4, seed=0), words):
        assert read.isfinite().all()


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks = 1: give at least 2"):
        models.build("lstm", {"blocks": 1}, 4, 0, device="meta")
    with pytest.raises(ValueError, match=r"width = 300 must be a multiple of heads = 7"):
        models.build("transformer", {"heads": 7}, 4, 0, device="meta")
