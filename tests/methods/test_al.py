from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import Method, resolve
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.lowering import lower
from scpl_dist.methods.schedule import Kind, StageSpec, simulate
from scpl_dist.methods.task import Classification
from scpl_dist.run.config import load
from tests.support.pipelines import run

WIDTH, CLASSES, CODE = 6, 3, 4


def trainables(**settings: object) -> tuple[dict[int, TrainableBlock], Method]:
    values: dict[str, object] = {"run.method": "al", "al.code": CODE}
    config = load(values=values | {f"al.{k}": v for k, v in settings.items()})
    method = resolve("al")(config, 3, Classification(CLASSES))
    torch.manual_seed(0)
    shape = torch.empty(2, WIDTH, device="meta")
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(3)]
    return {k: method.trainable(k, block, shape, shape) for k, block in enumerate(blocks)}, method


def layers(trainable: TrainableBlock, head: str) -> nn.Sequential:
    found = trainable.heads[head]
    assert isinstance(found, nn.Sequential)
    return found


def gradients(trainable: TrainableBlock, term: str, carry: dict[str, Tensor], labels: Tensor) -> set[str]:
    trainable.zero_grad()
    torch.autograd.backward(trainable.losses(carry, trainable(carry), labels)[term])
    return {
        name.removeprefix("heads.").split(".")[0]
        for name, p in trainable.named_parameters()
        if p.grad is not None
    }


def test_each_loss_trains_its_own_path() -> None:
    made, method = trainables()
    labels = torch.tensor([0, 2, 1, 1])
    carry = method.carry(torch.randn(4, WIDTH), labels)
    for trainable in made.values():
        trainable.train()
        assert gradients(trainable, "associated", carry, labels) == {"block", "bridge"}
        assert gradients(trainable, "autoencoder", carry, labels) == {"encoder", "decoder"}
        data, label = ({id(p) for p in path["params"]} for path in trainable.parameter_groups())
        assert not data & label
        assert len(data | label) == len(list(trainable.parameters()))
        carry = {name: tensor.detach() for name, tensor in trainable(carry).items()}


def test_losses_are_the_published_formulas() -> None:
    labels = torch.tensor([0, 2, 1, 1])
    for activation, function in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
        made, _ = trainables(activation=activation, bridge=5)
        trainable = made[0].train()
        x, y = torch.randn(4, WIDTH), functional.one_hot(labels, CLASSES).float()
        bridge, encoder, decoder = (layers(trainable, name) for name in ("bridge", "encoder", "decoder"))
        s = trainable.block(x)
        t = function(encoder[0](y))
        b = function(bridge[3](function(bridge[1](s))))
        back = function(decoder[0](t))
        wanted = functional.cross_entropy(back, labels) if activation == "tanh" else ((back - y) ** 2).mean()
        terms = trainable.losses({"data": x, "code": y}, trainable({"data": x, "code": y}), labels)
        torch.testing.assert_close(terms["associated"], ((b - t) ** 2).mean())
        torch.testing.assert_close(terms["autoencoder"], wanted)
    assert len(layers(made[1], "decoder")) == 1  # tanh: the decoders between blocks are linear


def test_the_answer_goes_back_through_all_stages_and_the_first_one_counts() -> None:
    _, method = trainables()
    specs = [StageSpec(k, 3, range(k, k + 1)) for k in range(3)]
    rows = simulate([lower(method.evaluate(spec, 1), spec) for spec in specs], capacity=1)
    texts = " ".join(str(action) for *_, action in rows[1])
    assert texts == "RECV_F.0 ROOM_F.0 F1.0 SEND_F.0 RECV_B.0 DEC1.0 ROOM_B.0 SEND_B.0"
    assert [row[-1][2].kind for row in rows] == [Kind.COUNT, Kind.SEND_B, Kind.SEND_B]


def test_a_shortcut_decodes_from_its_block() -> None:
    made, method = trainables()
    carry = {"data": torch.randn(4, WIDTH)}
    for trainable in made.values():
        trainable.eval()
    with torch.no_grad():
        carry = made[1](made[0](carry))
        answer = made[0].heads["decoder"](made[1].heads["decoder"](made[1].heads["bridge"](carry["data"])))
        scores = method.scores(made, 1, carry)
    assert scores is not None
    assert torch.equal(scores, answer)
    assert torch.equal(method.probabilities(scores), answer.clamp(0, 1))


def test_a_split_batch_has_the_gradient_of_the_whole_one() -> None:
    x, y = torch.randn(12, WIDTH), torch.arange(12) % CLASSES
    made, method = trainables(activation="tanh")
    whole = run(method, made, [range(1), range(1, 3)], x, y)
    parts = run(method, made, [range(3)], x, y, parts=3)
    for block in range(3):
        for a, b in zip(whole[block], parts[block], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
