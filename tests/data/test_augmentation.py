"""Augmentation depends on (seed, epoch, sample) alone, and colours change as torchvision's functions do."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from scpl_dist.data.augmentation import DRAWS, adjust_hue, jitter, shift_and_flip, uniform, views
from scpl_dist.run import seeds


def images(count: int, channels: int = 3, size: int = 12) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(count))


def test_numbers_of_a_sample_do_not_depend_on_its_batch() -> None:
    whole = uniform(0, 3, torch.arange(1000))
    assert torch.equal(uniform(0, 3, torch.tensor([17, 999, 0])), whole[[17, 999, 0]])
    assert whole.shape == (1000, DRAWS)
    assert whole.min() >= 0
    assert whole.max() < 1


def test_numbers_differ_by_seed_epoch_sample_and_purpose() -> None:
    tables = [uniform(seed, epoch, torch.arange(500)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(torch.cat(tables).flatten().tolist())) == 4 * 500 * DRAWS


def test_numbers_are_splitmix64_of_the_counter() -> None:
    mask = 2**64 - 1

    def plain(sample: int, draw: int) -> float:
        state = (seeds.derive(5, "augmentation", 2) + (sample * DRAWS + draw + 1) * 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return ((state ^ (state >> 31)) >> 11) * 2.0**-53

    numbers = uniform(5, 2, torch.tensor([0, 7, 123456789]))
    for row, sample in enumerate([0, 7, 123456789]):
        assert numbers[row].tolist() == [plain(sample, draw) for draw in range(DRAWS)]


def test_numbers_are_uniform_and_uncorrelated() -> None:
    numbers = uniform(0, 0, torch.arange(20000))
    assert (numbers.mean(0) - 0.5).abs().max() < 0.01
    assert (numbers.var(0) - 1 / 12).abs().max() < 0.002
    correlation = torch.corrcoef(numbers.T) - torch.eye(DRAWS)
    assert correlation.abs().max() < 0.03
    successive = torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1]
    assert abs(successive) < 0.03


def test_shift_is_a_crop_of_the_padded_image() -> None:
    batch = images(50)
    numbers = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = shift_and_flip(batch, numbers, shift=3, flip=True)
    for index, image in enumerate(batch):
        top, left = int(numbers[index, 0] * 7), int(numbers[index, 1] * 7)
        expected = tv.crop(tv.pad(image, [3]), top, left, 12, 12)
        if numbers[index, 2] < 0.5:
            expected = tv.horizontal_flip(expected)
        assert torch.equal(moved[index], expected)
    assert 10 < (numbers[:, 2] < 0.5).sum() < 40


def test_all_offsets_occur_and_none_beyond() -> None:
    numbers = uniform(0, 0, torch.arange(3000))
    point = torch.zeros(3000, 1, 9, 9)
    point[:, :, 4, 4] = 1
    moved = shift_and_flip(point, numbers[:, :3], shift=2, flip=False)
    assert moved.sum(dim=(1, 2, 3)).eq(1).all()
    places = moved.sum(dim=(0, 1))
    assert (places[2:7, 2:7] > 60).all()
    assert places.sum() == places[2:7, 2:7].sum()


def test_without_flip_nothing_is_mirrored() -> None:
    batch = images(20)
    numbers = torch.zeros(20, 3, dtype=torch.float64)
    numbers[:, :2] = 0.5  # the middle offset
    assert torch.equal(shift_and_flip(batch, numbers, 3, flip=False), batch)
    assert torch.equal(shift_and_flip(batch, numbers, 3, flip=True), batch.flip(3))


def test_jitter_equals_torchvision_with_the_same_factors_and_order() -> None:
    batch = images(60)
    numbers = uniform(0, 0, torch.arange(60))[:, 6:]
    changed = jitter(batch, numbers)
    orders = sorted((a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4))
    orders = [order for order in orders if len(set(order)) == 4]
    for index, image in enumerate(batch):
        apply, brightness, contrast, saturation, hue, order, grey = numbers[index].tolist()
        expected = image
        operations = [
            lambda x, f=0.6 + 0.8 * brightness: tv.adjust_brightness(x, f),
            lambda x, f=0.6 + 0.8 * contrast: tv.adjust_contrast(x, f),
            lambda x, f=0.6 + 0.8 * saturation: tv.adjust_saturation(x, f),
            lambda x, f=0.2 * hue - 0.1: tv.adjust_hue(x, f),
        ]
        if apply < 0.8:
            for operation in orders[int(order * 24)]:
                expected = operations[operation](expected)
        if grey < 0.2:
            expected = tv.rgb_to_grayscale(expected, num_output_channels=3)
        torch.testing.assert_close(changed[index], expected, rtol=0, atol=2e-5)
    assert 30 < (numbers[:, 0] < 0.8).sum() < 60


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 0.3, 0.5])
def test_hue_equals_torchvision_also_for_grey_black_and_pure_colours(turn: float) -> None:
    batch = images(8, size=4)
    batch[0], batch[1] = 0.0, 0.4
    batch[2] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    batch[3] = torch.tensor([0.0, 0.5, 0.5])[:, None, None]
    batch[4] = 1.0
    turned = adjust_hue(batch, torch.full((8, 1, 1, 1), turn))
    torch.testing.assert_close(turned, tv.adjust_hue(batch, turn), rtol=0, atol=2e-5)


def test_jitter_of_one_channel_changes_brightness_and_contrast_only() -> None:
    batch = images(40, channels=1)
    changed = jitter(batch, uniform(0, 0, torch.arange(40))[:, 6:])
    assert changed.shape == batch.shape
    assert not torch.equal(changed, batch)
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_jitter_leaves_its_input_alone() -> None:
    batch = images(40)
    copy = batch.clone()
    jitter(batch, uniform(0, 0, torch.arange(40))[:, 6:])
    assert torch.equal(batch, copy)


def test_kinds_of_views() -> None:
    batch = images(30)
    numbers = uniform(0, 0, torch.arange(30))
    basic = views(batch, numbers, "basic", 2, True)
    strong = views(batch, numbers, "strong", 2, True)
    assert torch.equal(basic, shift_and_flip(batch, numbers[:, :3], 2, True))
    assert torch.equal(strong[:30], basic)
    assert strong.shape == (60, 3, 12, 12)
    assert not torch.equal(strong[30:], basic)


def test_augmenting_one_sample_alone_equals_augmenting_it_in_a_batch() -> None:
    batch, samples = images(64), torch.arange(100, 164)
    whole = views(batch, uniform(1, 4, samples), "strong", 2, True)
    for index in (0, 31, 63):
        alone = views(batch[index : index + 1], uniform(1, 4, samples[index : index + 1]), "strong", 2, True)
        torch.testing.assert_close(alone, whole[[index, 64 + index]], rtol=0, atol=1e-6)


def test_key_of_the_numbers_is_derived_for_augmentation() -> None:
    digest = hashlib.blake2b(b"9:augmentation:1", digest_size=8).digest()
    assert seeds.derive(9, "augmentation", 1) == int.from_bytes(digest, "big") >> 1
