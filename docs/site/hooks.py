"""What the site adds to the pages: generated references, files that pages lead to, and that nothing else is loaded.

The pages are files of a repository first: their links lead to files beside `docs/`, too. Here each such file becomes
a page, so that no link leads out of the site, and none has to know where the repository is published.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from reference import PAGES

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
GENERATED = re.compile(r"<!-- generated: (\w+) -->")
LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".yml": "yaml",
    ".yaml": "yaml",
    ".json": "json",
    ".sh": "bash",
}
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; img-src 'self' data:"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make pages of the documents at the top, and of what pages lead to."""
    root = _root(config)
    documents = {path.name for path in root.glob("*.md")} - {"README.md"}
    found = {f"docs/{file.src_uri}" for file in files.documentation_pages()} | documents
    linked = {target for page in found for target in _targets(root, page)}
    for target in sorted((documents | linked) - {f"docs/{file.src_uri}" for file in files}):
        files.append(File.generated(config, _place(target), content=_content(root, target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and lead links to pages of the site."""
    here = page.file.src_uri
    if here.startswith("files/"):
        return markdown
    root = _root(config)
    source = f"docs/{here}" if (root / "docs" / here).exists() else here

    def led(link: re.Match[str]) -> str:
        target = _target(source, link[1])
        return relpath(_place(target), PurePosixPath(here).parent) if (root / target).exists() else link[1]

    return GENERATED.sub(lambda found: PAGES[found[1]](), _apart(LINK.sub(led, markdown)))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Forbid a page to load anything from another host."""
    return _closed(output)


def on_post_template(output: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page that is shown where there is none."""
    return _closed(output) if template_name.endswith(".html") else output


def _apart(markdown: str) -> str:
    """An empty line before a list that follows a paragraph at once; elsewhere, as on GitHub, it needs none."""
    lines: list[str] = []
    fence, inside = "", False  # of a block of code; of a block of lines that needs nothing, or nothing more
    for line in markdown.split("\n"):
        marker = re.match(r" *(```|~~~)", line)
        if marker:
            fence = "" if fence == marker[1] else fence or marker[1]
        item = re.match(r"(?:[-*]|\d+\.) ", line)
        begins = not lines or not lines[-1].strip()
        if item and not begins and not inside and not fence:
            lines.append("")
        inside = bool(item) or (inside and not begins)
        lines.append(line)
    return "\n".join(lines)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).resolve().parent


def _closed(output: str) -> str:
    return output.replace(
        "<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">', 1
    )


def _targets(root: Path, source: str) -> Iterator[str]:
    """Files and folders beside `docs/` that a document leads to, as paths in the repository."""
    for link in LINK.findall((root / source).read_text(encoding="utf-8")):
        target = _target(source, link)
        if (root / target).exists():
            yield target


def _target(source: str, link: str) -> str:
    return normpath(PurePosixPath(source).parent / link)


def _place(target: str) -> str:
    """Where a file of the repository is in the site."""
    if target.startswith("docs/") and not target.endswith((".ipynb", ".py")):
        return target.removeprefix("docs/")
    return target if target.endswith(".md") and "/" not in target else f"files/{target}.md"


def _content(root: Path, target: str) -> str:
    """A document as it is, a notebook cell by cell, and any other file as the text that it is."""
    path = root / target
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_cells(json.loads(path.read_text(encoding="utf-8"))))
    parts = [path] if path.is_file() else sorted(part for part in path.rglob("*") if part.is_file())
    return "\n\n".join([f"# {target}", *(_fenced(part, part.relative_to(root).as_posix()) for part in parts)])


def _fenced(path: Path, name: str) -> str:
    return f"## {name}\n\n~~~~~{LANGUAGES.get(path.suffix, '')}\n{path.read_text(encoding='utf-8').rstrip()}\n~~~~~"


def _cells(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        yield text if cell["cell_type"] == "markdown" else f"~~~~~python\n{text}\n~~~~~"
