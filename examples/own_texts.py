"""Train on texts in a table, and ask about new ones: ``python examples/own_texts.py``; about half a minute.

The table has a text and its class in each row. Here it is written first: the docstrings of three packages of Python's
standard library, and which of them they are from; put your own in its place. Each block answers (``early_exit``), so
an easy text can leave before the last one.
"""

from __future__ import annotations

import argparse
import ast
import csv
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import scpl_dist

DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PACKAGES = ("asyncio", "email", "unittest")
QUESTIONS = (
    "Run the event loop until it is stopped.",
    "Return the header of a message.",
    "Fail if the two are equal.",
)


def docstrings(package: str) -> Iterator[str]:
    """Those of all classes and functions of a package."""
    for path in sorted(Path(sysconfig.get_path("stdlib"), package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node)):
                yield text


def write_table(path: Path) -> None:
    """The columns are those that ``data.text_column`` and ``data.label_column`` name by default."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        rows.writerows((text, package) for package in PACKAGES for text in docstrings(package))


def main(epochs: int) -> None:
    """Write the table, train with two processes, and let the result answer."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "texts.csv")
        write_table(table)
        settings = {
            "run.method": "early_exit",
            "run.epochs": epochs,
            "data.root": str(table),
            "data.batch_size": 32,
            "data.args": {"length": 40},
        }
        result = scpl_dist.train("transformer_tiny", "csv", settings, Path(folder, "run"))
        print(f"test accuracy {result['accuracy_last']:.3f}")
        answers = scpl_dist.load(result["run_dir"]).predict(QUESTIONS, exit_threshold=0.9)
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(f"{answer.label}, {answer.probability:.0%} sure after block {answer.block}: {question}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
