"""Tables on the terminal, all drawn alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ()) -> None:
    """Print a table; columns are aligned to the right, as numbers are, but for those of `left`."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def console() -> Console:
    """Standard output: as wide as the terminal, or for another program so wide that no row is broken."""
    if sys.stdout.isatty():
        return Console()
    return Console(width=10_000, force_terminal=False)  # also where colours are forced, as in a notebook
