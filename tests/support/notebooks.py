"""Runs the cells of a notebook in a kernel: ``python tests/support/notebooks.py NOTEBOOK EXECUTED MESSAGES``.

Errors end nothing. MESSAGES gets what the kernel has told of outputs while the cells ran, a JSON list of (index of the
cell, message's type, its content): of an output that was changed in place, all its states.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


class Recording(NotebookClient):
    """A client that keeps all messages about outputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.messages: list[tuple[int, str, Any]] = []

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        """Keep it, and do what a client does."""
        if msg["msg_type"] in ("display_data", "update_display_data", "stream", "error"):
            self.messages.append((cell_index, msg["msg_type"], msg["content"]))
        return super().process_message(msg, cell, cell_index)


def main(notebook: Path, executed: Path, messages: Path) -> None:
    """Run it in the working directory."""
    # With it, a kernel would leave what programs print to pytest.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    content = nbformat.read(notebook, as_version=4)
    client = Recording(content, timeout=300, kernel_name="python3", allow_errors=True)
    client.execute()
    nbformat.write(content, executed)
    messages.write_text(json.dumps(client.messages, default=str))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
