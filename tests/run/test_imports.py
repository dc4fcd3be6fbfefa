"""Users' functions are found by name, and a wrong name says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scpl_dist.run.imports import bind, blaming, checked, load_object, name_of


def write(folder: Path, text: str, name: str = "own.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_finds_functions_of_packages_and_of_files(tmp_path: Path) -> None:
    import json

    assert load_object("json:dumps", "model.name") is json.dumps
    path = write(tmp_path, "def two():\n    return 2\n")
    assert load_object(f"{path}:two", "model.name")() == 2


def test_relative_paths_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "def three():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_object("own.py:three", "model.name")() == 3


def test_one_file_is_one_module(tmp_path: Path) -> None:
    path = write(tmp_path, "class Item:\n    pass\n\ndef make():\n    return Item()\n")
    assert isinstance(load_object(f"{path}:make", "a.b")(), load_object(f"{path}:Item", "a.b"))  # type: ignore[arg-type]


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        write(tmp_path / str(number), f"def value():\n    return {number}\n")
    values = [load_object(f"{tmp_path / str(number)}/own.py:value", "a.b")() for number in (1, 2)]
    assert values == [1, 2]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("json", "write package.module:function"),
        (":dumps", "write package.module:function"),
        ("json:", "write package.module:function"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("json.missing:f", "there is no module 'json.missing'"),
        ("json:no_such_name", "json has no 'no_such_name'; it has .*dumps"),
        ("math:pi", "'pi' is float, give a function"),
        ("nowhere/own.py:f", "there is no file .*nowhere/own.py"),
    ],
)
def test_wrong_names_are_refused_with_key_and_fix(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^model\.name = {name!r}: .*{says}"):
        load_object(name, "model.name")


def test_a_function_is_found_by_the_name_it_has(tmp_path: Path) -> None:
    import json

    assert name_of(json.dumps) == "json:dumps"
    path = write(tmp_path, "def two():\n    return 2\n")
    two = load_object(f"{path}:two", "model.name")
    assert name_of(two) == f"{path}:two"
    assert load_object(name_of(two), "model.name") is two


def test_functions_that_other_processes_cannot_import_have_no_name() -> None:
    def local() -> None:
        pass

    for function in (local, lambda: None):
        with pytest.raises(
            ValueError, match="other processes cannot import it; write it as a function at the top"
        ):
            name_of(function)


def test_a_file_has_one_module_name_in_every_process(tmp_path: Path) -> None:
    path = write(tmp_path, "def two():\n    return 2\n")
    code = (
        "from scpl_dist.run.imports import load_object; "
        f"print(load_object({str(path) + ':two'!r}, 'a.b').__module__)"
    )
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for number in (1, 2)
    }
    assert len(names) == 1


def test_checked_functions_refuse_other_types_and_pass_everything_else_on() -> None:
    def area(width: int, height: float = 2.0, *, names: list[str] | None = None) -> float:
        if width < 0:
            raise ValueError("own error")
        return width * height

    call = checked(area, "data.args")
    assert call(3) == 6
    assert call(3, height=1) == 3
    with pytest.raises(ValueError, match=r"^data\.args\.height = 'x': input should be a valid number$"):
        call(3, height="x")
    with pytest.raises(ValueError, match=r"^data\.args\.names\.1 = 2: input should be a valid string$"):
        call(3, names=["a", 2])
    with pytest.raises(ValueError, match=r"^own error$"):
        call(-1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = [\n", "line 1: SyntaxError: '\\[' was never closed; correct it there"),
        ("\nimport no_such_dependency\n", "line 2: ModuleNotFoundError: .*'no_such_dependency'; install"),
        ("from json import nothing\n", "line 1: ImportError: cannot import name 'nothing' .*; install"),
        ("\n\n1 / 0\n", "line 3: ZeroDivisionError: division by zero; .* mend it there"),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError: Expecting property name"),
        ("int('x')\n", "line 1: ValueError: invalid literal"),
        ("raise SystemExit(3)\n", "line 1: SystemExit: 3; .* if __name__"),
    ],
)
def test_what_a_file_raises_is_told_in_one_line_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    for _ in range(2):  # a failed import leaves nothing half loaded behind
        with pytest.raises(ValueError, match=rf"^model\.name = '{path}:f': {path}, {says}") as error:
            load_object(f"{path}:f", "model.name")
        assert "\n" not in str(error.value)


def test_the_place_of_an_error_is_in_the_file_that_is_to_be_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = write(tmp_path, "\ndef half(number):\n    return number / 0\n", "helper_of_a_test.py")
    path = write(tmp_path, "import helper_of_a_test\nhelper_of_a_test.half(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"'{path}:f': {helper}, line 3: ZeroDivisionError"):
        load_object(f"{path}:f", "model.name")


def test_a_value_error_that_says_all_itself_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"^a\.b = 'json:f': there"), blaming("a.b", "json:f"):
        raise ValueError("a.b = 'json:f': there is nothing; write it")


def test_arguments_that_a_function_does_not_take_are_refused_with_those_that_it_takes() -> None:
    def net(classes: int, width: int = 8) -> tuple[int, int]:
        return classes, width

    assert bind(net, "model.args", {"width": 3}, 0, name="net")(10) == (10, 3)
    with pytest.raises(
        ValueError, match=r"model\.args = {'depth': 3}: net cannot .* 'depth'; net takes width$"
    ):
        bind(net, "model.args", {"depth": 3}, 0, name="net")
    with pytest.raises(ValueError, match=r"mine cannot be called .*; mine takes no arguments$"):
        bind(lambda features, labels: None, "loss.args", {"depth": 3}, None, None, name="mine")
