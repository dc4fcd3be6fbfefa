"""A configuration as a text to be read and edited: every key with what it means, for ``init`` and ``--dry-run``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from scpl_dist.run.config import Block, Config

WIDTH = 120


def explained(config: Config) -> str:
    """TOML with a comment before each key, which `scpl_dist.run.config.load` reads back to an equal object."""
    return "\n".join(_lines(config)) + "\n"


def _lines(config: Config) -> Iterator[str]:
    for name, values in config.model_dump(mode="json").items():
        if isinstance(values, list):
            yield from _tables(name, values)
            continue
        section = type(getattr(config, name))
        yield from ("", *_comment(section.__doc__), f"[{name}]")
        # Tables stand last, as in TOML what follows their heading belongs to them.
        for key in sorted(values, key=lambda key: isinstance(values[key], dict)):
            table = isinstance(values[key], dict)
            yield from _comment(section.model_fields[key].description)
            yield tomli_w.dumps({name: {key: values[key]}} if table else {key: values[key]}).strip()


def _tables(name: str, tables: list[dict[str, Any]]) -> Iterator[str]:
    """A section that may be there several times; as a comment where it is not."""
    yield from ("", *_comment(Block.__doc__))
    for table in tables or [Block(index=0, freeze=True).model_dump(mode="json")]:
        lines = [f"[[{name}]]"]
        for key, value in table.items():
            lines += [*_comment(Block.model_fields[key].description), tomli_w.dumps({key: value}).strip()]
        yield from (line if tables or line.startswith("#") else f"# {line}" for line in lines)


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(" ".join((text or "").split()), WIDTH, initial_indent="# ", subsequent_indent="# ")


def write_defaults(target: Path) -> None:
    """Write the defaults into a new file; ValueError if that cannot be."""
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(explained(Config()).lstrip("\n"))
    except FileExistsError:
        raise ValueError(f"{target} exists: give a new file, or move it away") from None
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}") from None
