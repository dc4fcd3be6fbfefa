"""Data sets are read by position, never change between runs, and refuse what is wrong in them by name."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from scpl_dist import data
from scpl_dist.data.source import DataSource, Split
from scpl_dist.data.splits import check_labels, stratified
from scpl_dist.run import config
from tests.support.files import everything

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def digits(seed: int = 0, augmentation: str = "basic") -> DataSource:
    return data.resolve(config.load(values={"run.seed": seed, "data.augmentation": augmentation}))


def test_digits_are_the_real_images_split_in_70_10_20_percent() -> None:
    from sklearn.datasets import load_digits

    source = digits(augmentation="none")
    total = sum(source.sizes.values())
    assert total == 1797
    assert source.classes == 10
    shares = [source.sizes[split] / total for split in SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    parts = [everything(source, split) for split in SPLITS]
    original = torch.tensor(load_digits().target).bincount()
    assert torch.equal(
        sum((labels.bincount(minlength=10) for _, labels in parts), torch.zeros(10)).long(), original
    )
    assert all((labels.bincount(minlength=10) / len(labels) - 0.1).abs().max() < 0.02 for _, labels in parts)


def test_classes_are_counted_in_the_training_part_also_where_only_batches_tell_their_labels() -> None:
    source = digits()
    wanted = everything(source, "train")[1].bincount().tolist()
    assert torch.equal(source.training_labels(), DataSource.training_labels(source))
    assert data.counts(config.load(values={"task.class_weights": "balanced"}), source) == wanted
    assert data.counts(config.load(), source) == []  # nobody needs them


def test_digits_are_normalised_and_16_pixels_wide() -> None:
    images, labels = everything(digits(augmentation="none"), "train")
    assert images.shape[1:] == (1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.mean().abs() < 1e-3
    assert (images.std() - 1).abs() < 1e-3


def test_parts_do_not_overlap_and_do_not_depend_on_the_seed() -> None:
    first, other = digits(seed=0, augmentation="none"), digits(seed=1, augmentation="none")
    parts = {split: everything(first, split)[0] for split in SPLITS}
    for split in SPLITS:
        assert torch.equal(parts[split], everything(other, split)[0])
    distances = torch.cdist(parts["train"].flatten(1), parts["test"].flatten(1))
    assert distances.min() > 0


def test_a_training_batch_depends_on_seed_epoch_and_positions_only() -> None:
    source, positions = digits(), torch.tensor([5, 1200, 7])
    base = source.batch("train", 2, positions)[0]
    assert torch.equal(source.batch("train", 2, positions)[0], base)
    assert torch.equal(digits().batch("train", 2, torch.tensor([7, 5]))[0], base[[2, 0]])
    assert not torch.equal(source.batch("train", 3, positions)[0], base)
    assert not torch.equal(digits(seed=1).batch("train", 2, positions)[0], base)


def test_evaluation_parts_are_never_augmented() -> None:
    plain, augmented = digits(augmentation="none"), digits(augmentation="strong")
    for split in ("validation", "test"):
        images, labels = augmented.batch(split, 1, torch.arange(100))
        assert torch.equal(images, plain.batch(split, 0, torch.arange(100))[0])
        assert len(labels) == 100


def test_strong_gives_two_views_with_repeated_labels() -> None:
    images, labels = digits(augmentation="strong").batch("train", 0, torch.arange(10))
    assert images.shape == (20, 1, 16, 16)
    assert torch.equal(labels[:10], labels[10:])
    assert torch.equal(images[:10], digits().batch("train", 0, torch.arange(10))[0])


def test_digits_are_never_mirrored() -> None:
    plain = everything(digits(augmentation="none"), "train")[0]
    moved = everything(digits(), "train")[0]
    background = plain.min()
    padded = torch.nn.functional.pad(plain, (2,) * 4, value=float(background))
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1).flatten(2, 3)  # every shift of every image
    assert (windows - moved[:, :, None]).abs().amax(dim=(1, 3, 4)).amin(dim=1).max() < 1e-6


def test_batches_are_the_same_from_many_threads() -> None:
    source = digits(augmentation="strong")
    parts = torch.split(torch.arange(1200), 100)
    alone = [source.batch("train", 0, part)[0] for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: source.batch("train", 0, part)[0], parts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_example_has_two_samples() -> None:
    assert digits().example().shape == (2, 1, 16, 16)


def test_unknown_name_and_useless_args_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.name = 'imagenet22k': unknown; use one of digits, .*cifar10, .*csv"
    ):
        data.resolve(config.load(values={"data.name": "imagenet22k"}))
    with pytest.raises(ValueError, match=r"data\.args = \{'size': 3\}"):
        data.resolve(config.load(values={"data.args": {"size": 3}}))


@pytest.mark.parametrize("shares", [(0.1,), (0.1, 0.2)])
def test_stratified_parts_cover_everything_once_with_the_classes_shares(shares: tuple[float, ...]) -> None:
    labels = torch.arange(1000) % 7
    parts = stratified(labels, shares)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    for part, share in zip(parts[1:], shares, strict=True):
        counts = labels[part].bincount(minlength=7)
        assert (counts - labels.bincount() * share).abs().max() <= 1
        assert torch.equal(part, part.sort().values)
    assert all(torch.equal(a, b) for a, b in zip(parts, stratified(labels, shares), strict=True))


def test_a_class_with_one_sample_is_trained_on() -> None:
    first, second = stratified(torch.tensor([0] * 20 + [1]), (0.1,))
    assert 20 in first
    assert len(second) == 2


@pytest.mark.parametrize(
    ("labels", "classes", "says"),
    [
        ([0, 1, 3], 3, "sample 2 has label 3; 3 classes have the labels 0 to 2"),
        ([0, -1], 2, "sample 1 has label -1"),
        ([0, 0], 1, "has 1 class"),
        ([], 2, "no samples"),
    ],
)
def test_wrong_labels_are_refused(labels: list[int], classes: int, says: str) -> None:
    with pytest.raises(ValueError, match=f"here: .*{says}"):
        check_labels(torch.tensor(labels, dtype=torch.int64), classes, "here")


OWN = """
import numpy as np
import torch
from torch.utils.data import TensorDataset

def triple(root, width=3):
    def make(n):
        return TensorDataset(torch.arange(n * width).reshape(n, width).double(), torch.arange(n) % 2)
    return make(20), make(6), make(8)

def pair(root):
    train, _, test = triple(root)
    return train, test

def pytrees(root):
    rows = [({"image": np.full((2, 2), i, dtype=np.float64), "n": i}, i % 3) for i in range(30)]
    return rows, rows[:6], rows[6:12]

class Targets(list):
    targets = [0, 1] * 5
    classes = ["cat", "dog", "bird"]
    def __getitem__(self, index):
        return torch.zeros(3 if index != 4 else 2), self.targets[index]

def targets(root):
    return (Targets(range(10)),) * 3

def objects(root):
    rows = [(object(), i % 2) for i in range(4)]
    return rows, rows, rows

def mixed(root):
    rows = [(torch.zeros(3), 0), (torch.zeros(3), 1), (torch.zeros(4), 0)]
    return rows, rows, rows

def wrong_label(root):
    good = [(torch.zeros(3), i % 2) for i in range(4)]
    return good, good, [(torch.zeros(3), 5)]

def text_label(root):
    return ([(torch.zeros(3), "cat")],) * 2

def fraction_label(root):
    return ([(torch.zeros(3), 0.5)],) * 2

def sequence_label(root):
    return ([(torch.zeros(3), torch.tensor([0, 1]))],) * 2

class Sequences(torch.utils.data.Dataset):
    targets = [0, 1]
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return torch.zeros(3), [0, 1]

def targets_are_not_the_labels(root):
    return (Sequences(),) * 3

def column(root):
    return (torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.tensor([[0], [1], [1], [0]])),) * 3

def one_class(root):
    return ([(torch.zeros(3), 0)] * 4,) * 3

def empty(root):
    good = [(torch.zeros(3), i % 2) for i in range(4)]
    return good, [], good

def no_pair(root):
    return [torch.zeros(3)], [torch.zeros(3)]

def one(root):
    return [(torch.zeros(3), 0)]

def iterator(root):
    return iter([]), iter([])
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., DataSource]:
    path = tmp_path / "own.py"
    path.write_text(OWN)

    def load(function: str, **values: object) -> DataSource:
        return data.resolve(config.load(values={"data.name": f"{path}:{function}", **values}))

    return load


def test_users_data_sets_are_fed_as_they_are(own: Callable[..., DataSource]) -> None:
    source = own("triple", **{"data.args": {"width": 2}})
    assert source.sizes == {"train": 20, "validation": 6, "test": 8}
    assert source.classes == 2
    inputs, labels = source.batch("train", 0, torch.tensor([3, 0]))
    assert inputs.tolist() == [[6, 7], [0, 1]]
    assert labels.tolist() == [1, 0]
    assert source.example().shape == (2, 2)


def test_a_pair_of_data_sets_gives_up_a_tenth_for_validation(own: Callable[..., DataSource]) -> None:
    source = own("pair")
    assert source.sizes == {"train": 18, "validation": 2, "test": 8}
    train, held_out = (everything(source, split)[0] for split in ("train", "validation"))
    assert sorted(torch.cat([train, held_out])[:, 0].tolist()) == [3.0 * i for i in range(20)]


def test_inputs_may_be_pytrees_and_become_single_precision(own: Callable[..., DataSource]) -> None:
    inputs, labels = own("pytrees").batch("validation", 0, torch.tensor([4, 1]))
    assert inputs["image"].dtype == torch.float32
    assert inputs["image"].shape == (2, 2, 2)
    assert inputs["n"].tolist() == [4, 1]
    assert labels.tolist() == [1, 1]


def test_inputs_that_no_tensor_can_be_made_of_are_refused(own: Callable[..., DataSource]) -> None:
    with pytest.raises(ValueError, match=r"validation: inputs are object; return tensors, arrays"):
        own("objects").example()


def test_targets_save_reading_every_sample_and_classes_are_counted(own: Callable[..., DataSource]) -> None:
    source = own("targets")
    assert source.classes == 3
    assert source.batch("train", 0, torch.tensor([0, 1]))[0].shape == (2, 3)
    with pytest.raises(ValueError, match=r"train: sample 4 has shape \(2,\), sample 3 has \(3,\)"):
        source.batch("train", 0, torch.tensor([3, 4]))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("mixed", r"sample 2 has shape \(4,\), sample 0 has \(3,\)"),
        ("wrong_label", "test: sample 0 has label 5; 2 classes have the labels 0 to 1"),
        ("text_label", "sample 0 has label 'cat' of type str"),
        ("fraction_label", "sample 0 has label 0.5 of type float"),
        ("sequence_label", "sample 0 has 2 labels of type Tensor; each sample has one class"),
        ("targets_are_not_the_labels", "validation: sample 0 has 2 labels of type list"),
        ("one_class", "has 1 class"),
        ("empty", "validation: has no samples"),
        ("no_pair", "sample 0 is no pair"),
        ("one", r"return \(train, validation, test\)"),
        ("iterator", "give one with a length"),
        ("missing", "has no 'missing'"),
    ],
)
def test_wrong_data_sets_are_refused(own: Callable[..., DataSource], function: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        own(function).example()


def test_a_column_of_labels_is_one_label_a_sample(own: Callable[..., DataSource]) -> None:
    assert own("column").batch("train", 0, torch.tensor([2, 0]))[1].tolist() == [1, 0]


def test_args_that_do_not_fit_and_strong_augmentation_are_refused(own: Callable[..., DataSource]) -> None:
    with pytest.raises(ValueError, match=r"data\.args = \{'size': 3\}: .* cannot be called"):
        own("triple", **{"data.args": {"size": 3}})
    with pytest.raises(ValueError, match=r'data\.augmentation = "strong": .*fed as they are'):
        own("triple", **{"data.augmentation": "strong"})
