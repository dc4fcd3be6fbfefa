"""`scpl_dist.train` in a cell of a notebook: a table of the run that is drawn anew in place, and mistakes in one line.

    train() --starts--> launcher --names the run folder--> thread --asks--> coordinator's /status --> the cell

Elsewhere nothing of this happens, and IPython is no dependency: who has a cell has it.
"""

from __future__ import annotations

import contextvars
import importlib
import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType

from scpl_dist.commands.top import ask, url_of
from scpl_dist.coordinator.table import StatusTable

_EVERY_S = 1.0  # seconds between two looks, and less before the first that succeeds
_SOON_S = 0.2
_WIDTH = 110  # characters


def present() -> bool:
    """Whether this is the process of a notebook's cells."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@contextmanager
def one_line() -> Iterator[None]:
    """Mistakes and failures are shown without a traceback in a cell: it would be that of this package."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if present():
            text = f"{type(error).__name__}: {error}"
            error._render_traceback_ = lambda: [text]  # type: ignore[union-attr]  # IPython asks for it
        raise


@contextmanager
def live_table() -> Iterator[Callable[[Path], None]]:
    """A table in the cell that runs, from when the value is called with the folder of the run, to the end."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def begin(folder: Path) -> None:
        # What a thread shows belongs to the cell whose context it has.
        context = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run, args=(_follow, folder, over), daemon=True))
        threads[-1].start()

    try:
        yield begin if present() else lambda folder: None
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _follow(folder: Path, over: threading.Event) -> None:
    display = importlib.import_module("IPython.display").display
    picture, shown = StatusTable(), None
    while not over.wait(_EVERY_S if shown else _SOON_S):
        try:
            status = ask(url_of(str(folder)))
        except (OSError, ValueError):  # the coordinator does not listen yet, or not any more
            continue
        drawn = _by_type(picture.draw(status))
        if shown is None:
            shown = display(drawn, raw=True, display_id=True)
        else:
            shown.update(drawn, raw=True)
    if shown is not None:  # what is left says how the run ended, as on a terminal
        shown.update({"text/plain": ""}, raw=True)


def _by_type(drawn: RenderableType) -> dict[str, str]:
    console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False)
    console.print(drawn)
    html = console.export_html(clear=False, inline_styles=True, code_format="<pre>{code}</pre>")
    return {"text/html": html, "text/plain": console.export_text()}
