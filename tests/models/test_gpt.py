"""The built-in decoder: a token sees those before it, in their order, wherever the blocks are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scpl_dist import models
from scpl_dist.models import gpt

SMALL = {"width": 16, "layers": 4, "heads": 2}
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 6]])


def made(blocks: int) -> list[nn.Module]:
    return models.build("gpt", SMALL | {"blocks": blocks}, 9, seed=0)


def through(blocks: list[nn.Module], tokens: Tensor) -> Tensor:
    found: Tensor = nn.Sequential(*blocks)(tokens)
    return found


def test_a_token_changes_nothing_before_it() -> None:
    first, second = through(made(2), TOKENS)
    torch.testing.assert_close(first[:4], second[:4], rtol=0, atol=0)
    assert not torch.allclose(first[4:], second[4:])


def test_the_order_of_tokens_matters_and_their_place_in_the_text_does_not() -> None:
    blocks = made(2)
    swapped = through(blocks, TOKENS[:, [1, 0, 2, 3, 4, 5]])
    assert not torch.allclose(swapped[:, -1], through(blocks, TOKENS)[:, -1])
    # Rotations tell distances: a text of one token repeated is the same from any place on.
    torch.testing.assert_close(
        through(blocks, torch.full((1, 3), 4))[0, 2], through(blocks, torch.full((1, 6), 4))[0, 2]
    )


def test_blocks_only_say_where_the_layers_are_cut() -> None:
    whole, parts = made(1), made(4)
    weights = [parameter for block in parts for parameter in block.parameters()]
    with torch.no_grad():
        for own, other in zip(whole[0].parameters(), weights, strict=True):
            own.copy_(other)
    torch.testing.assert_close(through(whole, TOKENS), through(parts, TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"blocks": 3}, "blocks = 3 and layers = 4: give each block as many layers"),
        ({"heads": 3}, "width = 16 and heads = 3: .*such as 96"),
        ({"heads": 16}, "width = 16 and heads = 16"),
    ],
)
def test_shares_that_do_not_come_out_even_are_refused(args: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        gpt.gpt(9, **(SMALL | args))
