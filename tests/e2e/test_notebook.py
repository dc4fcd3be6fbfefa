"""The example notebook in a real kernel, with a cell more: what a user of notebooks does and sees."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from scpl_dist.commands.history import History
from tests.support.programs import ROOT, run

pytestmark = pytest.mark.timeout(900)

TYPED = """
import scpl_dist

def typed(classes):
    return []

scpl_dist.train(typed)
"""


@dataclass
class Executed:
    cells: list[Any]  # of code
    messages: list[tuple[str, Any]]  # type and content, of the cell that trains
    folder: Path


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    notebook.cells.append(nbformat.v4.new_code_cell(TYPED))
    nbformat.write(notebook, folder / "with_a_cell_more.ipynb")
    own = {name: str(folder / "home") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    own |= {"JUPYTER_RUNTIME_DIR": str(folder / "home"), "MPLCONFIGDIR": str(folder / "home")}
    files = [folder / name for name in ("with_a_cell_more.ipynb", "executed.ipynb", "messages.json")]
    program = ROOT / "tests" / "support" / "notebooks.py"
    run(sys.executable, program, *files, cwd=folder, env=own, code=0, limit_s=500)
    cells = nbformat.read(files[1], as_version=4).cells
    [training] = [place for place, cell in enumerate(cells) if "train(blocks, data" in cell.source]
    messages = [message for place, *message in json.loads(files[2].read_text()) if place == training]
    return Executed(
        [cell for cell in cells if cell.cell_type == "code"],
        [(kind, what) for kind, what in messages],
        folder,
    )


def text_of(cell: Any) -> str:
    """What a cell's last line has given."""
    [output] = [output for output in cell.outputs if output.output_type == "execute_result"]
    return str(output.data["text/plain"])


def test_all_cells_of_the_example_run(executed: Executed) -> None:
    for cell in executed.cells[:-1]:
        assert not [output for output in cell.outputs if output.output_type == "error"]
    _, training, looking, answering, _ = executed.cells
    accuracy = float(text_of(training).partition(",")[0].lstrip("("))
    assert accuracy > 0.97  # chance is 0.5
    assert eval(text_of(looking))["test_accuracy"] == accuracy
    assert any("image/png" in output.get("data", {}) for output in looking.outputs)
    answers = eval(text_of(answering))
    assert len(answers) == 5
    assert sum(int(label) == right for label, _, right in answers) >= 4


def test_the_table_of_the_run_is_changed_in_place_while_it_trains(executed: Executed) -> None:
    shown = [what for kind, what in executed.messages if kind == "display_data"]
    changed = [what for kind, what in executed.messages if kind == "update_display_data"]
    assert len(shown) == 1
    assert {what["transient"]["display_id"] for what in shown + changed} == {
        shown[0]["transient"]["display_id"]
    }
    for what in (*shown, *changed[:-1]):
        assert what["data"].keys() == {"text/html", "text/plain"}
        assert what["data"]["text/plain"].split()[:5] == ["stage", "step", "loss", "busy", "waiting"]
        assert what["data"]["text/html"].startswith("<pre>")
        assert "\x1b" not in what["data"]["text/plain"]
    assert changed[-1]["data"] == {"text/plain": ""}


def test_lines_in_a_cell_are_plain_and_end_with_the_run_folder(executed: Executed) -> None:
    text = "".join(what["text"] for kind, what in executed.messages if kind == "stream")
    [folder] = re.findall(r"^run folder (runs/\d+-\d+-spirals); ", text, re.MULTILINE)
    assert "\x1b" not in text
    history = History.read(executed.folder / folder)
    assert [row["step"] for row in history.steps] == list(range(450))
    assert {"step", "epoch", "seconds", "lr", "loss_0", "loss_1", "loss_2"} == history.steps[0].keys()
    assert [row["epoch"] for row in history.epochs] == list(range(30))


def test_a_function_that_was_typed_into_a_cell_is_answered_in_one_line(executed: Executed) -> None:
    [error] = executed.cells[-1].outputs
    [line] = error.traceback
    assert line.startswith("ValueError: typed: the worker processes cannot import what was typed into")
    assert line.endswith(
        "in a notebook by a cell that begins with %%writefile own.py, and import it from there"
    )
    assert not list(executed.folder.glob("runs/*-scpl"))
