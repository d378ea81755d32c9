"""Where an error comes from: plugins, files and lines, steps and examples."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.origin import describe, during, shown
from harness.core.registry import Plugin, import_target

pytestmark = pytest.mark.quick


def plugin(target: str, distribution: str = "theirs") -> Plugin:
    return Plugin(name="mine", distribution=distribution, result_version=1, target=target)


def caught(function: object, *arguments: object) -> Exception:
    try:
        function(*arguments)  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_the_innermost_step_and_examples_are_kept() -> None:
    def fail() -> None:
        with during("outer", ["a", "b"]), during("", ["c"]), during("inner"):
            raise ValueError("broken\n twice")

    error = caught(fail)
    text = describe(error, [], Path("/runs/x/log.txt"))
    place = r"\S+/tests/core/test_origin.py:\d+ in fail"
    assert re.fullmatch(rf"ValueError: broken twice \(inner; {place}; example c; log: /runs/x/log.txt\)", text)
    assert error.__notes__ == ["inner", "example c"]


def test_many_examples_are_counted() -> None:
    def fail() -> None:
        with during("", map(str, range(20))):
            raise UserError("x")

    text = describe(caught(fail), [], Path("log"))
    assert text == "UserError: x (examples 0, 1, 2, 3, 4, 5, 6, 7, … and 12 more; log: log)"


def test_the_plugins_line_is_named_even_if_a_library_raised(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import json\n\ndef read(text):\n    return json.loads(text)\n", encoding="utf-8")
    scope: dict[str, object] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    error = caught(scope["read"], "{")
    text = describe(error, [plugin(f"{path}:Mine", "mine.py")], Path("log"))
    assert f"(plugin mine (mine.py), {path}:4 in read; log: log)" in text


def test_another_module_of_the_plugins_package_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "theirpackage"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "plugin.py").write_text("from theirpackage.inner import fail\n", encoding="utf-8")
    (package / "inner.py").write_text("def fail():\n    raise OSError('inner')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from theirpackage.plugin import fail  # type: ignore[import-not-found]

    try:
        text = describe(caught(fail), [plugin("theirpackage.plugin:Mine")], Path("log"))
    finally:
        for name in [name for name in sys.modules if name.startswith("theirpackage")]:
            del sys.modules[name]
    assert f"plugin mine (theirs), {package}/inner.py:2 in fail" in text


def test_paths_below_the_working_directory_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "log.txt") == "runs/log.txt"
    assert shown(Path("/elsewhere/log.txt")) == "/elsewhere/log.txt"


def test_who_returned_what_is_wrong_is_named_by_its_class(tmp_path: Path) -> None:
    (path := tmp_path / "theirs.py").write_text("x = 1\n\n\nclass Made:\n    pass\n", encoding="utf-8")
    made = import_target(f"{path}:Made", "metric")
    with pytest.raises(ValueError, match="it returned 7") as found, during("scoring", of=made()):
        raise ValueError("it returned 7")
    text = describe(found.value, [plugin(f"{path}:Made")], Path("log"))
    assert text == f"ValueError: it returned 7 (scoring; plugin mine (theirs), {path}:4 class Made; log: log)"


def test_leaving_the_process_is_an_error_with_its_place(tmp_path: Path) -> None:
    def leave() -> None:
        with during("scoring", ["a"]):
            sys.exit(3)

    with pytest.raises(RuntimeError, match=r"sys\.exit\(3\) was called, which would end the process") as found:
        leave()
    text = describe(found.value, [plugin(f"{__file__}:Mine")], tmp_path)
    assert re.search(rf"\(scoring; plugin mine \(theirs\), {re.escape(__file__)}:\d+ in leave; example a; log: ", text)


def test_ray_may_ask_a_worker_to_leave() -> None:
    space = {"__name__": "ray._private.worker", "SystemExit": SystemExit}
    exec("def leave():\n    raise SystemExit(1)", space)
    with pytest.raises(SystemExit, match=r"^1$"), during("scoring"):
        space["leave"]()  # type: ignore[operator]


def test_an_error_that_a_generator_makes_of_another_keeps_its_step() -> None:
    def steps() -> Iterator[int]:
        with during("encoding", ["a"]):
            next(iter([]))
        yield 1

    text = describe(caught(lambda: list(steps())), [plugin(f"{__file__}:Mine")], Path("log"))
    assert re.match(r"RuntimeError: generator .* \(encoding; plugin mine .*; example a; log: ", text)
