"""``scpl-dist predict``: files in, rows out, all of them or none."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

import scpl_dist
from tests.support.command import called
from tests.support.files import picture, write_csv, write_image
from tests.support.saved_runs import saved


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("images") / "run", **{"run.method": "early_exit"})


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rows = [
        (f"common number{index} {'fine' if index % 2 else 'dull'}", "ab"[index % 2]) for index in range(60)
    ]
    table = write_csv(folder / "all.csv", rows, header=("review", "label"))
    values = {
        "data.name": "csv",
        "data.root": str(table),
        "data.text_column": "review",
        "data.args.length": 3,
    }
    return saved(
        folder / "run", **{"model.name": "transformer_tiny", "model.args": {"vocabulary": 50}, **values}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(5):
        write_image(tmp_path / "pictures" / f"{index}.png", picture(index))
    return tmp_path / "pictures"


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def alike(found: list[dict[str, str]], wanted: list[dict[str, str]]) -> None:
    """The same answers; sums of a batch of another size, or of another row, may differ in the last digit."""
    assert [(row["label"], row["block"]) for row in found] == [(row["label"], row["block"]) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)


def test_images_of_a_folder_are_rows_with_what_the_module_says(images: Path, folder: Path) -> None:
    rows = table(called("predict", images, folder, "--batch-size", "2").stdout)
    expected = scpl_dist.load(images).predict(sorted(folder.iterdir()))
    assert [row["input"] for row in rows] == [str(path) for path in sorted(folder.iterdir())]
    assert [(row["label"], row["block"]) for row in rows] == [(one.label, str(one.block)) for one in expected]
    for row, one in zip(rows, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(one.probability, abs=1e-5)


def test_a_file_has_all_rows_also_of_early_answers_and_one_block_at_a_time(
    images: Path, folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    options = ["--probabilities", "--exit-threshold", "0.15", "--low-memory", "--batch-size", "2"]
    said = called("predict", images, folder, "-o", target, *options).stdout
    assert said == f"5 predictions in {target}\n"
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    expected = scpl_dist.load(images).predict(sorted(folder.iterdir()), exit_threshold=0.15)
    assert [(row["label"], row["block"]) for row in rows] == [(one.label, one.block) for one in expected]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probabilities"][row["label"]] == row["probability"]
    called("predict", images, folder, "-o", tmp_path / "out.csv", "--probabilities")
    assert list(table((tmp_path / "out.csv").read_text())[0])[4:] == [str(digit) for digit in range(10)]


def test_texts_of_a_table_or_of_lines_and_long_ones_are_cut_with_one_warning(
    texts: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "common fine\n\ncommon number7 fine fine fine fine\ncommon number7 fine\nwords words words words\n"
    )
    done = called("predict", texts, lines)
    rows = table(done.stdout)
    assert [row["input"] for row in rows] == ["1", "2", "3", "4", "5"]
    alike(rows[2:3], rows[3:4])
    told = [
        line for line in done.stderr.splitlines() if "predicted" not in line
    ]  # how far it is, if that takes long
    assert told == ["warning: 2 text(s) with more than 3 words were cut, as in training"]
    new = write_csv(tmp_path / "new.csv", [("common fine",), ("",)], header=("review",))
    alike(table(called("predict", texts, new).stdout), rows[:2])


def test_a_bad_input_leaves_nothing_behind(images: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "9.png").write_text("no image")
    said = called("predict", images, folder, "-o", tmp_path / "out.csv", code=2).stderr
    assert "9.png: cannot be read as an image" in said
    assert list(tmp_path.iterdir()) == [folder]
    (folder / "0.png").write_text("none, in the first batch")
    assert called("predict", images, folder, code=2).stdout == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pictures", "-o", "out.txt"], "-o out.txt: unknown format; end the name in one of .csv, .jsonl"),
        (["pictures", "-o", "nowhere/out.csv"], "there is no folder nowhere; make it first"),
        (["absent"], "absent: there is no such file or folder"),
        (["pictures", "--depth", "7"], "--depth 7: the model has 4 blocks"),
        (["pictures", "--exit-threshold", "2"], "--exit-threshold 2.0: give the probability"),
        (["pictures", "--device", "abacus"], "--device abacus: unknown"),
        (["pictures", "--batch-size", "0"], "--batch-size 0: give the number"),
    ],
)
def test_what_cannot_be_is_one_line(
    images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(folder.parent)
    said = called("predict", images, *arguments, code=2).stderr
    assert says in said
    assert len(said.splitlines()) == 1
    assert list(folder.parent.iterdir()) == [folder]
