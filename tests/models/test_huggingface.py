"""Models of Hugging Face's transformers: cut at their layers, they are what they were whole."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from scpl_dist.methods.block import TrainableBlock
from scpl_dist.models import huggingface, resolve
from scpl_dist.models.huggingface import Block
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from tests.support import hugging, in_threads, reference

FAMILIES = [*hugging.ENCODERS, *hugging.DECODERS, *hugging.IMAGES]


def plan(folder: Path, given: Any, classes: int = 3, **values: Any) -> Plan:
    settings = {
        "model.name": f"hf:{folder}",
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return Plan.plan(config.load(values=settings), classes, given)


def blocks(plan: Plan, chosen: range | None = None) -> dict[int, TrainableBlock]:
    """Blocks with their first weights, ready to answer."""
    found = plan.trainables(chosen or range(len(plan.parameters)))
    plan.load_weights(found)
    return {index: one.eval() for index, one in found.items()}


def answer(found: dict[int, TrainableBlock], carry: Any) -> torch.Tensor:
    with torch.no_grad():
        for one in found.values():
            carry = one(carry)
        return found[max(found)].predict(carry)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_same_logits_in_blocks_as_whole(family: str, tmp_path: Path) -> None:
    whole = hugging.saved(family, tmp_path)
    given = hugging.inputs(family)
    cut = plan(tmp_path, given, run__method="bp", model__args={"blocks": 3})
    cut.check()  # compares them, too, with other weights
    found = blocks(cut)
    torch.testing.assert_close(answer(found, given), hugging.logits(whole, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_a_cut_that_computes_something_else_is_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging.saved(family, tmp_path)
    row = huggingface.FAMILIES[family]
    # As if another version of transformers had a norm where the table does not know of it, or another head.
    wrong = dataclasses.replace(row, norm=None) if row.norm else dataclasses.replace(row, head=row.head[-1:])
    monkeypatch.setitem(huggingface.FAMILIES, family, wrong)
    with pytest.raises(
        ValueError, match=f"(other logits than whole|no block has) .* the family {family}; take"
    ):
        plan(tmp_path, hugging.inputs(family)).check()


def test_a_decoder_keeps_a_head_for_tokens(tmp_path: Path) -> None:
    import transformers

    settings = transformers.AutoConfig.for_model(
        "llama", **hugging.SETTINGS["llama"], tie_word_embeddings=True
    )
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(settings).eval()
    whole.save_pretrained(tmp_path)
    given = hugging.inputs("llama")["input_ids"]  # ids alone, as of packed texts
    args = {"blocks": 2, "head": "tokens"}
    found = plan(tmp_path, given, hugging.VOCABULARY, run__method="bp", model__args=args)
    found.check()
    torch.testing.assert_close(
        answer(blocks(found), given), hugging.logits(whole, {"input_ids": given}), rtol=1e-5, atol=1e-5
    )


def test_a_block_holds_its_own_layers_alone(tmp_path: Path) -> None:
    hugging.saved("bert", tmp_path)
    found = plan(tmp_path, hugging.inputs("bert"), model__args={"blocks": 2})
    first, second = blocks(found).values()
    assert {name.split(".")[1] for name, _ in second.block.named_parameters()} == {"encoder"}
    assert sorted({name.split(".")[3] for name, _ in second.block.named_parameters()}) == ["0", "1"]
    assert isinstance(first.block, Block)
    assert isinstance(second.block, Block)
    assert not set(first.block.original_names.values()) & set(second.block.original_names.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc, which is Linux's")
def test_a_stage_with_half_the_layers_takes_half_the_memory(tmp_path: Path) -> None:
    hugging.saved("llama", tmp_path, hidden_size=512, intermediate_size=2048)
    found = plan(tmp_path, hugging.inputs("llama"), run__method="bp")
    layers = 4 * sum(found.parameters)  # bytes
    assert layers > 60 * 2**20
    half = _peak_of_child(lambda: blocks(found, range(2, 4)))
    whole = _peak_of_child(lambda: blocks(found, range(4)))
    # Not as a ratio: what a fork and its imports take is the same in both, and depends on the process that forks.
    assert whole - half > 0.4 * layers
    assert layers < whole < 2.5 * layers  # with the pages of the file


def _peak_of_child(work: Callable[[], object]) -> int:
    """Bytes that a process which forks from this one takes at most for its work beyond what it begins with."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            before = _status("VmHWM")
            held = work()
            os.write(write, str(_status("VmHWM") - before if held else 0).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        peak = int(answer.read())
    os.waitpid(child, 0)
    return peak


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def test_weights_without_the_names_of_the_family_or_a_head_are_taken(tmp_path: Path) -> None:
    whole = hugging.made("bert")
    whole.bert.save_pretrained(tmp_path)  # no "bert." before its names, and no classifier
    given = hugging.inputs("bert")
    found = blocks(plan(tmp_path, given, run__method="bp", model__args={"blocks": 2}))
    for own, name, wanted in (
        (
            found[0],
            "block.model.embeddings.word_embeddings.weight",
            whole.bert.embeddings.word_embeddings.weight,
        ),
        (found[1], "heads.predictor.layers.0.weight", whole.bert.pooler.dense.weight),
    ):
        torch.testing.assert_close(own.get_parameter(name), wanted)


def test_weights_of_another_model_say_which_tensors_differ(tmp_path: Path) -> None:
    hugging.saved("bert", tmp_path / "narrow")
    hugging.saved("bert", tmp_path / "wide", intermediate_size=64)
    hugging.saved("bert", tmp_path / "deep", num_hidden_layers=5)
    given = hugging.inputs("bert")

    def unfit(folder: str) -> list[str]:
        return list(plan(tmp_path / "narrow", given, model__weights=str(tmp_path / folder)).unfit())

    with pytest.raises(
        ValueError,
        match=r"bert.encoder.layer.0.intermediate.dense.weight is \(64, 32\), of the model \(48, 32\)",
    ):
        unfit("wide")
    with pytest.raises(ValueError, match=r"16 unexpected \(bert.encoder.layer.4.attention.*weights_strict"):
        unfit("deep")


def test_what_cannot_be_a_model_is_refused_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    transformers.T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="is a t5, which cannot be cut; these can be: bert, roberta, "):
        resolve(f"hf:{tmp_path}/t5", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config.json cannot be read .*; give the folder of a model"):
        resolve(f"hf:{tmp_path}/empty", {})
    hugging.made("bert").config.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no model.safetensors: .*model.args.pretrained = false"):
        resolve(f"hf:{tmp_path}/bare", {})(3)
    with pytest.raises(ValueError, match="blocks = 5: give 1 to 4, its number of layers"):
        resolve(f"hf:{tmp_path}/bare", {"pretrained": False, "blocks": 5})(3)
    with pytest.raises(ValueError, match='head = "tokens": bert does not predict tokens'):
        resolve(f"hf:{tmp_path}/bare", {"pretrained": False, "head": "tokens"})(3)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"there is no folder no/such, and the hub does not give it .*download it"
    ):
        resolve("hf:no/such", {})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'pip install "scpl_dist\[hf\]"'):
        resolve(f"hf:{tmp_path}/bare", {})


def texts(root: str) -> list[Texts]:
    return [Texts(40, 0), Texts(10, 1), Texts(10, 2)]


class Texts(Dataset[tuple[dict[str, torch.Tensor], int]]):
    """Random ids and masks; the label is that of the first token."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, hugging.VOCABULARY, (size, 7), generator=generator)
        self.lengths = torch.randint(1, 8, (size,), generator=generator)
        self.targets = (self.ids[:, 0] % 3).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        mask = (torch.arange(7) < self.lengths[index]).long()
        return {"input_ids": self.ids[index] * mask, "attention_mask": mask}, self.targets[index]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", ["scpl", "bp"])
def test_two_stages_equal_a_plain_loop(family: str, method: str, tmp_path: Path) -> None:
    # Without dropout, which draws from a generator that the threads of the stages share.
    still: dict[str, Any] = (
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    )
    hugging.made(family, **still).config.save_pretrained(tmp_path)
    values = {
        "run.method": method,
        "run.epochs": 2,
        "model.name": f"hf:{tmp_path}",
        "model.args": {"pretrained": False},
        "data.name": f"{__name__}:texts",
        "data.batch_size": 16,
    }
    wanted = reference.train(config.load(values=values))
    found = in_threads.Run(config.load(values=values)).result
    assert found.losses == wanted.losses
    assert found.accuracy == wanted.accuracy
    for index, own in wanted.trainables.items():
        for name, value in own.state_dict().items():
            assert torch.equal(found.trainables[index].state_dict()[name], value), name
