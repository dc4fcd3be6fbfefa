"""The documentation as a site: built without a network and a warning, complete, and loading nothing from elsewhere."""

from __future__ import annotations

import html
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from scpl_dist.cli import app
from scpl_dist.coordinator.metrics import NAMES
from scpl_dist.run.config import Block, Config
from tests.support.browser import shown
from tests.support.programs import ROOT, run

# A namespace of its own has no network at all.
OFFLINE = ["unshare", "--net"] if sys.platform == "linux" and os.geteuid() == 0 else []
LOADED = {"src", "srcset", "poster", "data"}


def build(configuration: Path, target: Path, code: int = 0) -> str:
    """Build a site as CI does; what was said."""
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", configuration)
    return run(*OFFLINE, *command, "--site-dir", target, cwd=ROOT, code=code, limit_s=120).stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    build(ROOT / "mkdocs.yml", target)
    return target


class Tags(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


def pages(site: Path) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    assert len(found) > 20
    return found


def first_cells(page: Path) -> set[str]:
    text = page.read_text(encoding="utf-8")
    return {html.unescape(name) for name in re.findall(r"<tr>\s*<td><code>(.*?)</code></td>", text)}


def test_the_reference_has_every_key(site: Path) -> None:
    sections = {name: Block if name == "block" else type(value) for name, value in Config()}
    keys = {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    assert first_cells(site / "reference" / "configuration.html") == keys
    assert "runtime.precision" in keys


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    def paths(command: Any, path: str) -> Iterator[tuple[str, set[str]]]:
        yield path, {word for parameter in command.params for word in getattr(parameter, "opts", [])}
        for name, inner in getattr(command, "commands", {}).items():
            yield from paths(inner, f"{path} {name}")

    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    parts = re.split(r'<h2 id="[^"]*">(.*?)<a ', text)
    shown_of = dict(zip(parts[1::2], parts[2::2], strict=True))
    expected = dict(paths(typer.main.get_command(app), "scpl-dist"))
    assert shown_of.keys() == expected.keys()
    assert "scpl-dist checkpoint verify" in expected
    for path, options in expected.items():
        missing = {word for word in options if word.startswith("-") and word not in shown_of[path]}
        assert not missing, path


def test_the_reference_has_every_metric(site: Path) -> None:
    assert first_cells(site / "reference" / "metrics.html") == NAMES.keys()


def test_every_page_is_in_the_navigation(site: Path) -> None:
    named = re.findall(r"^ *- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    documents = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert documents <= set(named)
    assert [name for name in named if not (site / name).with_suffix(".html").is_file()] == []


def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    for page in pages(site):
        tags = Tags(page).found
        loaded = [
            value
            for tag, attributes in tags
            for name, value in attributes.items()
            if name in LOADED or (tag == "link" and name == "href" and attributes.get("rel") != "canonical")
        ]
        assert loaded
        assert not [value for value in loaded if re.match(r"\s*(\w+:)?//", value)], page
        # Scripts could still ask for more; the browser is told to refuse it, before it has read anything else.
        head = next(position for position, (tag, _) in enumerate(tags) if tag == "head")
        assert tags[head + 1][1]["http-equiv"] == "Content-Security-Policy", page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:\w+:)?//", style.read_text(encoding="utf-8")), (
            style
        )


def test_lists_and_tables_are_lists_and_tables(site: Path) -> None:
    """Markdown on the site is stricter than where files are read: what it takes for prose shows its signs."""
    for page in pages(site):
        for text in re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL):
            assert not re.search(r"^ {0,3}(?:[-*] |\d+\. |\||#+ |```)", text, re.MULTILINE), f"{page}: {text}"


def test_a_browser_shows_a_page_without_complaint(site: Path, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            found = shown(f"http://127.0.0.1:{server.server_port}/understand.html", tmp_path)
        finally:
            server.shutdown()
    assert found.console == []
    assert "no gradient" in found.text


def small_site(folder: Path, text: str, nav: list[dict[str, str]]) -> Path:
    """The configuration of a site with one page and what it leads to, which is checked as the whole one is."""
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(f"# A page\n\n{text}\n")
    inherited = {"INHERIT": str(ROOT / "mkdocs.yml"), "hooks": [str(ROOT / "docs" / "site" / "hooks.py")]}
    own = {"theme": {"name": "mkdocs"}, "plugins": [], "extra_css": [], "nav": [{"A page": "index.md"}, *nav]}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(inherited | own))
    return folder / "mkdocs.yml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a page](missing.md)", "missing.md"),
        ("[a file](../missing.py)", "../missing.py"),
        ("[a place](#missing)", "#missing"),
        ("[elsewhere](/missing.md)", "/missing.md"),
    ],
)
def test_a_link_that_leads_nowhere_ends_the_build(text: str, said: str, tmp_path: Path) -> None:
    assert said in build(small_site(tmp_path, text, []), tmp_path / "site", code=1)


def test_files_and_notebooks_that_a_page_leads_to_are_pages(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    cells = [("markdown", ["# A tour\n", "of it"]), ("code", ["import scpl_dist"])]
    notebook = {"cells": [{"cell_type": kind, "source": source} for kind, source in cells]}
    (tmp_path / "examples" / "tour.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "examples" / "run.toml").write_text("epochs = 3\n")
    text = "[a tour](../examples/tour.ipynb) of [a folder](../examples)"
    nav = [{"Notebook": "files/examples/tour.ipynb.md"}]
    build(small_site(tmp_path, text, nav), tmp_path / "site")
    tour, folder = (
        (tmp_path / "site" / "files" / name).read_text()
        for name in ("examples/tour.ipynb.html", "examples.html")
    )
    assert ">A tour<" in tour
    assert "cell_type" not in tour
    assert re.search(r"import.*scpl_dist", tour)
    assert re.search(r"epochs.*3", folder)
    page = (tmp_path / "site" / "index.html").read_text()
    assert {'href="files/examples/tour.ipynb.html"', 'href="files/examples.html"'} <= set(
        re.findall(r'href="files[^"]*"', page)
    )
