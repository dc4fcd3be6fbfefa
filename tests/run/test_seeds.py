from __future__ import annotations

import torch

from scpl_dist.data.sampling import permutation
from scpl_dist.models.build import seeded
from scpl_dist.run.seeds import derive


def test_purposes_and_positions_draw_different_numbers() -> None:
    drawn = {
        derive(seed, purpose, *at)
        for seed in (0, 1)
        for purpose in ("a", "b")
        for at in [(), (0,), (0, 1), (1, 0)]
    }
    assert len(drawn) == 16
    assert all(0 <= number < 2**63 for number in drawn)


def test_a_permutation_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(5)
    first = permutation(0, 3, 100)
    torch.manual_seed(6)
    assert torch.equal(first, permutation(0, 3, 100))
    assert not torch.equal(first, permutation(0, 4, 100))
    assert not torch.equal(first, permutation(1, 3, 100))
    assert torch.equal(first.sort().values, torch.arange(100))


def test_seeded_puts_the_global_state_back() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(0, "weights", 2):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(0, "weights", 2):
        assert torch.equal(torch.rand(3), inside)
