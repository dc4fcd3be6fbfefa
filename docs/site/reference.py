"""The reference that no hand writes: of the configuration's models, the command's parsers, the exporter's table."""

from __future__ import annotations

import html
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from scpl_dist.cli import app
from scpl_dist.coordinator.metrics import NAMES
from scpl_dist.run.config import Block, Config, Effect
from scpl_dist.run.phases import Phase


def configuration() -> str:
    """A table a section: type, default and meaning of a key, and what another value does to a run that goes on."""
    lines = [*_table(("goes on", "means"), [(effect.name.lower(), effect.value) for effect in Effect])]
    for name, field in Config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        several = isinstance(default, list)  # [[block]]
        section = Block if several else type(default)
        lines += [
            "",
            f"## {f'[[{name}]]' if several else f'[{name}]'} {{ #{name} }}",
            "",
            _plain(section.__doc__ or ""),
            "",
        ]
        effects = _effect(field.metadata) if several else None
        lines += _table(
            ("key", "is", "default", "means", "goes on"),
            [
                (
                    f"`{name}.{key}`",
                    kind(of.annotation, of.metadata),
                    _default(of),
                    _plain(of.description or ""),
                    effects or _effect(of.metadata),
                )
                for key, of in section.model_fields.items()
            ],
        )
    return "\n".join(lines)


def commands() -> str:
    """Each command with its usage, its arguments and its options, as ``--help`` has them."""
    return "\n".join(_command(typer.main.get_command(app), "scpl-dist"))


def metrics() -> str:
    """Name, type, labels and help of each metric."""
    counts = {True: "counter", False: "gauge"}
    rows = [
        (
            f"`{name}`",
            counts[name.endswith("_total")],
            ", ".join(f"`{label}`" for label in labels),
            _plain(text),
        )
        for name, (text, labels, _) in NAMES.items()
    ]
    phases = ", ".join(f"`{phase.value}`" for phase in Phase)
    return "\n".join([*_table(("metric", "type", "labels", "means"), rows), "", f"Phases: {phases}."])


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "metrics": metrics,
}
"""What the comment ``<!-- generated: NAME -->`` of a page stands for."""

WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "table"}


def kind(annotation: Any, limits: Iterable[Any] = ()) -> str:
    """A type in words, such as "integer above 0, or list of integer above 0"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            part
            for limit in arguments[1:]
            for part in (limit.metadata if isinstance(limit, FieldInfo) else [limit])
        ]
        return kind(arguments[0], inner)
    if origin in (Union, types.UnionType):
        return ", or ".join(kind(part) for part in arguments)
    if origin is Literal:
        return ", ".join(f"`{_value(value)}`" for value in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    signs = {Gt: ("above", "gt"), Ge: ("from", "ge"), Lt: ("below", "lt"), Le: ("up to", "le")}
    bounds = [
        f"{word} {getattr(limit, of)}"
        for limit in limits
        for sign, (word, of) in signs.items()
        if isinstance(limit, sign)
    ]
    return " ".join([WORDS[origin or annotation], *bounds])


def _command(command: Any, path: str) -> Iterator[str]:
    """A command, and then those in it."""
    context = command.context_class(command, info_name=path)
    yield from (f"## {path}", "", _plain(command.help or ""), "")
    yield from ("```", " ".join([path, *command.collect_usage_pieces(context)]), "```", "")
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if records:
        yield from (*_table(("", ""), [(f"`{name}`", _plain(text)) for name, text in records]), "")
    for name, inner in getattr(command, "commands", {}).items():
        yield from _command(inner, f"{path} {name}")


def _default(field: FieldInfo) -> str:
    return "needed" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"


def _value(value: Any) -> str:
    return json.dumps(value)  # TOML writes these values alike


def _effect(metadata: Iterable[Any]) -> str:
    return next(part.name.lower() for part in metadata if isinstance(part, Effect))


def _plain(text: str) -> str:
    """Prose as Markdown: what it says in backticks is code, and nothing else has a meaning."""
    parts = re.split(r"(`+[^`]+`+)", text)
    parts[::2] = [re.sub(r"([*|\\])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "".join(parts)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(' '.join(cell.split()) for cell in row)} |"
