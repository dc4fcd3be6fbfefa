from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import losses, resolve
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.task import Classification
from scpl_dist.run import registry
from scpl_dist.run.config import load

CLASSES = 4
IMAGE = torch.empty(2, 6, 5, 5, device="meta")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.convolution(x).relu()
        return output


def trainable(method: str, index: int = 0, **loss: object) -> TrainableBlock:
    torch.manual_seed(0)
    config = load(values={"run.method": method} | {f"loss.{key}": value for key, value in loss.items()})
    return resolve(method)(config, 2, Classification(CLASSES)).trainable(
        index, Block(), torch.empty(2, 3, 5, 5, device="meta"), IMAGE
    )


def trained(made: TrainableBlock, terms: list[str]) -> set[str]:
    """Parts that get a gradient from some terms."""
    made.zero_grad()
    x, labels = torch.randn(12, 3, 5, 5), torch.arange(12) % CLASSES
    found = made.losses(x, made(x), labels)
    torch.autograd.backward(torch.stack([found[term] for term in terms]).sum())
    return {
        name.removeprefix("heads.").split(".")[0] for name, p in made.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize(
    ("name", "terms", "heads"),
    [
        ("supcon", ["contrastive"], {"projector"}),
        ("ce", ["local"], {"classifier"}),
        ("predsim", ["similarity", "local"], {"similarity", "classifier"}),
        ("deinforeg", ["covariance", "invariance", "variance"], {"projector"}),
    ],
)
def test_an_objective_trains_its_block_and_the_predictor_never_does(
    name: str, terms: list[str], heads: set[str]
) -> None:
    assert trained(trainable("scpl", name=name), terms) == heads | {"block"}
    last = trainable("scpl", index=1, name=name)
    assert trained(last, terms) == heads | {"block"}
    assert trained(last, ["classifier"]) == {"predictor"}
    watched = trainable("scpl", name=name, local_predictors=True)
    assert trained(watched, ["classifier"]) == {"predictor"}
    assert watched.local_scores(watched(torch.randn(2, 3, 5, 5))) is not None


def test_local_scores_exist_where_a_classifier_is_trained() -> None:
    x = torch.randn(2, 3, 5, 5)
    for method, loss, able in (
        ("scpl", "supcon", False),
        ("scpl", "ce", True),
        ("early_exit", "supcon", True),
    ):
        made = trainable(method, name=loss)
        scores = made.local_scores(made(x))
        assert (scores is not None) == able
        assert scores is None or scores.shape == (2, CLASSES)


def layers(made: TrainableBlock) -> list[type]:
    found = made.heads["classifier"].layers
    assert isinstance(found, nn.Sequential)
    return [type(layer) for layer in found]


def test_early_exit_has_the_published_classifier() -> None:
    assert layers(trainable("early_exit")) == [nn.Flatten, nn.Linear, nn.Sigmoid, nn.Linear]
    assert layers(trainable("early_exit", classifier="l")) == [nn.Flatten, nn.Linear]
    with pytest.raises(ValueError, match=r"loss.classifier = 'x'"):
        trainable("early_exit", classifier="x")


def test_similarity_matching_is_the_mean_squared_difference_of_correlations() -> None:
    features, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    wanted = (
        (torch.corrcoef(features) - torch.corrcoef(functional.one_hot(labels, CLASSES).float()))
        .square()
        .mean()
    )
    torch.testing.assert_close(losses.similarity_matching(features, labels, CLASSES), wanted)
    images = torch.randn(7, 5, 4, 4)
    spread = images.flatten(2).std(2)
    assert torch.equal(
        losses.similarity_matching(images, labels, CLASSES),
        losses.similarity_matching(spread, labels, CLASSES),
    )


def test_deinforeg_is_the_published_formula() -> None:
    features, labels = torch.randn(9, 5), torch.arange(9) % CLASSES
    z = features / features.norm(dim=1, keepdim=True)
    covariance = torch.cov(z.T, correction=0)
    off = covariance - torch.diag(covariance.diagonal())
    terms = losses.deinforeg(features, labels, CLASSES)
    torch.testing.assert_close(terms["covariance"], (off**2).sum() / 5)
    torch.testing.assert_close(terms["variance"], torch.relu(1 - (z.var(0) + 1e-7).sqrt()).mean() / 9)
    torch.testing.assert_close(terms["invariance"], losses.similarity_matching(z, labels, CLASSES))


@pytest.mark.parametrize("name", ["supcon", "predsim", "deinforeg"])
def test_equal_features_and_single_samples_give_finite_gradients(name: str) -> None:
    for x in (torch.zeros(6, 3, 5, 5), torch.zeros(1, 3, 5, 5)):
        made = trainable("scpl", name=name)
        made.block.load_state_dict({name: torch.zeros_like(p) for name, p in made.block.state_dict().items()})
        terms = made.losses(x, made(x), torch.zeros(len(x), dtype=torch.int64))
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in made.parameters())


OWN = """
def pull(features, labels, factor=1.0):
    return factor * features.square().mean()

def wrong(features, labels):
    return features
"""


def test_a_loss_of_ones_own_is_found_by_file_and_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own_losses.py"
    file.write_text(OWN)
    assert trained(trainable("scpl", name=f"{file}:pull", args={"factor": 2.0}), ["local"]) == {
        "projector",
        "block",
    }
    with pytest.raises(ValueError, match=r"returned \(12, 1024\), return a tensor without dimensions"):
        trained(trainable("scpl", name=f"{file}:wrong"), ["local"])
    with pytest.raises(ValueError, match=r"loss.args = {'weight': 1}"):
        trainable("scpl", name=f"{file}:pull", args={"weight": 1})
    with pytest.raises(ValueError, match=r"loss.name = 'pull': unknown; use one of supcon, ce"):
        trainable("scpl", name="pull")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("pull", "own_losses:pull", "scpl_dist.methods.losses")
    monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert trained(trainable("scpl", name="pull"), ["local"]) == {"projector", "block"}
