"""Real English texts that need no download: the docstrings of Python's own standard library.

The task is to tell which section of the library reference a docstring's module belongs to. Sources are
parsed, not imported. Another version of Python has other docstrings, so accuracies compare within one
version only.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from scpl_dist.run.config import Config
from scpl_dist_recipes.text import TextSource

SECTIONS = {
    "text and formats": "argparse cmd codecs configparser csv difflib gettext getopt locale netrc optparse plistlib "
    "pprint re reprlib shlex string stringprep textwrap tomllib",
    "numbers and dates": "_pydatetime _pydecimal bisect calendar datetime decimal fractions heapq numbers random "
    "statistics zoneinfo _strptime",
    "files and storage": "_compression _pyio bz2 copyreg dbm filecmp fileinput fnmatch genericpath glob gzip io lzma "
    "ntpath os pathlib pickle posixpath shelve shutil sqlite3 stat tarfile tempfile zipfile",
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal "
    "socket subprocess threading",
    "internet": "base64 email ftplib html http imaplib ipaddress json mailbox mimetypes poplib quopri smtplib "
    "socketserver ssl urllib uuid webbrowser wsgiref xml xmlrpc",
    "language": "abc ast code codeop compileall contextlib dataclasses dis enum functools importlib inspect keyword "
    "modulefinder opcode pickletools pkgutil py_compile pyclbr runpy symtable tabnanny token tokenize traceback "
    "types typing warnings zipimport",
    "testing and profiling": "bdb cProfile doctest pdb profile pstats timeit trace tracemalloc unittest",
}
"""Section of the library reference -> its modules and packages that are written in Python."""

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(
    config: Config,
    length: int = 60,
    vocabulary: int | None = None,
    vectors: str | None = None,
    validation: float = 0.1,
) -> TextSource:
    """Seven classes, about 5,000 docstrings of modules, classes and functions; a fifth is the test part.

    A text that several places share is used once, so that no test text is in the training part.

    Raises:
        ValueError: this Python has no sources of its standard library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    rows: list[tuple[str, str]] = []
    seen: set[str] = set()
    for section, modules in SECTIONS.items():
        for module in modules.split():
            for text in _texts(library, module):
                if text not in seen:
                    seen.add(text)
                    rows.append((text, section))
    if len({section for _, section in rows}) < len(SECTIONS):
        raise ValueError(
            f'data.name = "docstrings": {library} has no Python sources of the standard library; use another data set'
        )
    return TextSource(config, {"train": rows}, length, vocabulary, vectors, validation)


def _texts(library: Path, module: str) -> Iterator[str]:
    """Docstrings in a module or package, in the order of the source; nothing for one that this Python lacks."""
    folder = library / module
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [library / f"{module}.py"]:
        if not path.is_file():
            continue
        yield from _documented(ast.parse(path.read_bytes()))


def _documented(node: Definition) -> Iterator[str]:
    """Docstrings of a definition and of the definitions directly inside it."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(inner)
