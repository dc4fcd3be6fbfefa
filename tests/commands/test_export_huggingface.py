"""``export --format hf``: what transformers loads answers as the run did."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers

from scpl_dist.commands import saved
from tests.support import hugging
from tests.support.command import called
from tests.support.files import write_csv
from tests.support.saved_runs import saved as run_of


def table(folder: Path) -> str:
    return str(
        write_csv(
            folder / "all.csv",
            [(f"{'fine' if n % 2 else 'dull'} number {n}", "ab"[n % 2]) for n in range(60)],
        )
    )


def scores(run: Path, inputs: object) -> torch.Tensor:
    found = saved.find(run, device="cpu")
    carry = inputs
    with torch.no_grad():
        for block in found.blocks().values():
            carry = block(carry)
        return found.blocks()[len(found.blocks()) - 1].predict(carry)


@pytest.mark.parametrize(
    ("family", "method"), [("bert", "early_exit"), ("deberta-v2", "scpl"), ("llama", "early_exit")]
)
def test_transformers_loads_what_was_trained(family: str, method: str, tmp_path: Path) -> None:
    hugging.saved(family, tmp_path / "first", classes=2, vocab_size=200)
    hugging.tokeniser(tmp_path / "first")
    values = {"model.name": f"hf:{tmp_path / 'first'}", "run.method": method, "data.args": {"length": 20}}
    run = run_of(tmp_path / "run", **{"data.name": "csv", "data.root": table(tmp_path), **values})
    said = called("export", run, tmp_path / "out", "--format", "hf").stdout
    assert said.endswith(f"tensors in {tmp_path / 'out'}\n")
    tokeniser = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == {0: "a", 1: "b"}
    inputs = dict(tokeniser(["fine number 7", "dull"], padding=True, return_tensors="pt"))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(hugging.logits(model, given), scores(run, given), rtol=1e-5, atol=1e-5)
    first = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "first")
    assert not torch.equal(next(first.parameters()), next(model.parameters()))


def test_a_graph_of_a_model_that_reads_masks_answers_the_same(tmp_path: Path) -> None:
    hugging.saved("bert", tmp_path / "first", classes=2, vocab_size=200)
    hugging.tokeniser(tmp_path / "first")
    values = {"model.name": f"hf:{tmp_path / 'first'}", "data.args": {"length": 20}}
    run = run_of(tmp_path / "run", **{"data.name": "csv", "data.root": table(tmp_path), **values})
    called("export", run, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    made = saved.find(run, device="cpu").preprocessing
    assert made is not None
    for texts in (["fine number 7"], ["dull", "fine number 1 2 3 4 5", "number 9"]):
        inputs = made.batch(texts)
        named = dict(zip((one.name for one in session.get_inputs()), inputs.values(), strict=True))
        [found] = session.run(None, {name: one.numpy() for name, one in named.items()})
        torch.testing.assert_close(torch.from_numpy(found), scores(run, inputs), rtol=1e-4, atol=1e-5)


def test_what_transformers_cannot_have_is_refused(tmp_path: Path) -> None:
    hugging.saved("vit", tmp_path / "first")
    run = run_of(
        tmp_path / "run",
        **{"model.name": f"hf:{tmp_path / 'first'}", "data.name": "digits"},
    )
    said = called("export", run, tmp_path / "out", "--format", "hf", "--depth", "1", code=2).stderr
    assert "--depth 1 and --format hf: transformers has the whole model" in said
    called("export", run, tmp_path / "out", "--format", "hf")
    said = called("export", run, tmp_path / "out", "--format", "hf", code=2).stderr
    assert f"{tmp_path / 'out'} cannot be written: Directory not empty" in said
    run = run_of(tmp_path / "other")
    said = called("export", run, tmp_path / "no", "--format", "hf", code=2).stderr
    assert "--format hf writes models of Hugging Face" in said


def test_a_decoder_that_learned_the_next_token_is_one_for_transformers(tmp_path: Path) -> None:
    hugging.saved("llama", tmp_path / "first", head="CausalLM", vocab_size=200)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"the {number} words of text {number}\n" * 8)
    values = {"model.name": f"hf:{tmp_path / 'first'}", "model.args": {"head": "tokens"}, "task.name": "lm"}
    values |= {"data.name": "text_lm", "data.root": str(texts), "data.args": {"length": 16}}
    run = run_of(tmp_path / "run", **values, **{"run.method": "early_exit"})
    classes = saved.find(run, device="cpu").plan.classes
    assert classes < 200  # the characters of the texts: the model's other tokens have no scores
    called("export", run, tmp_path / "out", "--format", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    given = {"input_ids": torch.arange(14).view(2, 7) % classes}
    found = scores(run, given["input_ids"])
    assert found.shape == (2, 7, classes)
    torch.testing.assert_close(hugging.logits(model, given)[..., :classes], found, rtol=1e-5, atol=1e-5)
    said = called("generate", run, "--prompt", "the ", "--tokens", "5").stdout
    assert said.startswith("the ")


def test_texts_of_more_tokens_than_the_model_has_are_refused(tmp_path: Path) -> None:
    hugging.saved("llama", tmp_path / "first", head="CausalLM", vocab_size=100)
    args = {"length": 16, "limit": 20_000, "tokenizer": "bytes"}
    values: dict[str, object] = {"model.name": f"hf:{tmp_path / 'first'}", "model.args": {"head": "tokens"}}
    values |= {"task.name": "lm", "data.name": "text_lm", "data.args": args, "run.method": "early_exit"}
    with pytest.raises(ValueError, match="has 100 tokens, and the tokeniser of the data 257"):
        run_of(tmp_path / "run", **values)
