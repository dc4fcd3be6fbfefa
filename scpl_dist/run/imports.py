"""Calls what a configuration names: ``package.module:function`` or ``path/to/file.py:function``, with arguments.

Models and data sets are named in a text file and built in several processes, so what they need is a name that
every process can look up, not an object that one of them has. `key` is the key of the configuration that holds the
name or the arguments, such as ``model.name``; the messages begin with it.

What the user's code raises on the way becomes a message of one line with its file and line (`blaming`): the traceback
would be that of this package for the most part.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

# Start of the names of modules that were loaded from a path, which no other process can import by name.
_FROM_FILE = "scpl_dist_user_"
# What `load_object` imports at this moment: a file that starts a run then would start runs without end.
in_progress: list[str] = []


def checked(function: Callable[..., Any], key: str) -> Callable[..., Any]:
    """The same function, which refuses arguments of another type than it declares; all its parameters have types."""
    strict = validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return strict(*args, **kwargs)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join([key, *map(str, problem["loc"])])
            raise ValueError(f"{place} = {problem['input']!r}: {problem['msg'].lower()}") from None

    return call


def bind(
    function: Callable[..., Any], key: str, args: Mapping[str, Any], *positional: Any, name: str
) -> Callable[..., Any]:
    """The function with the user's arguments; ValueError, which calls it `name`, if they do not fit `positional`."""
    signature = inspect.signature(function)
    try:
        signature.bind(*positional, **args)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[len(positional) :]) or "no arguments"
        raise ValueError(
            f"{key} = {dict(args)!r}: {name} cannot be called with them: {error}; {name} takes {known}"
        ) from None
    return functools.partial(function, **args)


def load_object(name: str, key: str) -> Callable[..., Any]:
    """Import the callable of this name; a relative path starts at the working directory.

    ValueError if there is none, and for whatever the file raises while it is imported.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{key} = {name!r}: write package.module:function or path/to/file.py:function")
    in_progress.append(name)
    try:
        with blaming(key, name):
            module = (
                _from_file(Path(place), name, key)
                if place.endswith(".py")
                else _from_package(place, name, key)
            )
    finally:
        in_progress.pop()
    if not hasattr(module, attribute):
        public = ", ".join(sorted(entry for entry in vars(module) if not entry.startswith("_"))[:20])
        raise ValueError(f"{key} = {name!r}: {place} has no {attribute!r}; it has {public or 'nothing'}")
    found: object = getattr(module, attribute)
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"{key} = {name!r}: {attribute!r} is {kind}, give a function or class")
    return found


def _from_file(path: Path, name: str, key: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"{key} = {name!r}: there is no file {path}; check the path")
    # One module for one file lets two loads share classes; the same name in every process allows pickling by name.
    module_name = f"{_FROM_FILE}{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _from_package(place: str, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
            raise  # the module exists, something that it imports does not
        fix = "install it, or write path/to/file.py:function"
        raise ValueError(f"{key} = {name!r}: there is no module {error.name!r}; {fix}") from None


@contextmanager
def blaming(key: str, name: str) -> Iterator[None]:
    """Around the user's code: what it raises becomes a ValueError with the place in that code, and with what to do.

    A ValueError of this package, or of one that is installed, stays as it is: it says all that itself.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        nearest = [f"{module}." for module in modules if f"{module}.".startswith(("scpl_dist.", _FROM_FILE))]
        if isinstance(error, ValueError) and not nearest[-1].startswith(_FROM_FILE):
            raise
        fix = next(text for kind, text in _FIXES.items() if isinstance(error, kind))
        text = error.msg if isinstance(error, SyntaxError) else error
        what = f"{type(error).__name__}: {text}; {fix}"
        raise ValueError(f"{key} = {name!r}: {_place(error)}: {what}") from error


_FIXES: dict[type[BaseException], str] = {
    SyntaxError: "correct it there",
    ImportError: "install what is missing, or correct the import",
    SystemExit: 'what a file does as a program stands under if __name__ == "__main__":',
    BaseException: "it comes from this line, so mend it there",
}


def _place(error: BaseException) -> str:
    """File and line of an error: the innermost that are of neither a library nor this package, if there are such."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "<frozen" not in frame.filename]
    paths = sysconfig.get_paths()
    libraries = (paths["stdlib"], paths["purelib"], paths["platlib"], str(Path(__file__).parents[1]))
    theirs = [frame for frame in frames if not frame.filename.startswith(libraries)]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def name_of(function: Callable[..., Any]) -> str:
    """The name that `load_object` finds a function by in any process; ValueError for a lambda or a local function."""
    name = getattr(function, "__qualname__", type(function).__name__)
    module = sys.modules.get(getattr(function, "__module__", ""))
    if module is None or not name.isidentifier() or getattr(module, name, None) is not function:
        fix = "write it as a function at the top level of a file"
        raise ValueError(f"{name}: other processes cannot import it; {fix}")
    if module.__name__ != "__main__" and not module.__name__.startswith(_FROM_FILE):
        return f"{module.__name__}:{name}"
    file = getattr(module, "__file__", None)
    if file is None:
        raise ValueError(
            f"{name}: the worker processes cannot import what was typed into an interpreter or a cell: write it into a "
            "file, in a notebook by a cell that begins with %%writefile own.py, and import it from there"
        )
    return f"{Path(file).resolve()}:{name}"


def digest(values: Any) -> str:
    """16 hexadecimal digits of the user's files that are named somewhere in plain values, as ``file.py:name``."""
    found = hashlib.sha256()
    for name in sorted(_files(values)):
        with contextlib.suppress(OSError):  # who imports it says so
            found.update(Path(name).read_bytes())
    return found.hexdigest()[:16]


def _files(values: Any) -> Iterator[str]:
    if isinstance(values, Mapping):
        values = values.values()
    if isinstance(values, str):
        place = values.rpartition(":")[0]
        if place.endswith(".py"):
            yield place
    elif isinstance(values, Iterable):
        for value in values:
            yield from _files(value)
