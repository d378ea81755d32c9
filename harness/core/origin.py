"""Says where an error comes from: the plugin, its file and line, the step of a trial, and the examples."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.core.beside import modules_beside
from harness.core.errors import UserError
from harness.core.registry import Plugin, Registry, plugin_file

_SHOWN_EXAMPLES = 8
_MESSAGE_LENGTH = 500
_ATTRIBUTE = "harness_origin"  # of an exception: what was done, and the ids of the examples
_REPOSITORY = Path(__file__).parents[2]
_OWN = {"adapters", "harness", "results", "tasks"}  # packages with the built-in plugins, and much that is none


@contextmanager
def during(step: str = "", examples: Iterable[str] = (), of: Any = None) -> Iterator[None]:
    """Note on an exception what was being done; the innermost step and the innermost examples are kept.

    Args:
        step: such as "encoder of modality image".
        examples: ids of the examples in this step.
        of: what does it, an object or its class; named where no line of it is in the traceback, because what it
            returned is wrong.
    """
    try:
        yield
    except SystemExit as error:
        if _is_of_ray(error):  # the worker is asked to end
            raise
        ended = RuntimeError(f"sys.exit({error.code!r}) was called, which would end the process")
        _note(ended, step, examples, of)
        raise ended from error
    except Exception as error:
        _note(error, step, examples, of)
        raise


def _note(error: BaseException, step: str, examples: Iterable[str], of: Any) -> None:
    known: dict[str, str] = getattr(error, _ATTRIBUTE, {})
    new = {key: text for key, text in (("step", step), ("examples", _listed(list(examples)))) if text}
    if added := {key: text for key, text in new.items() if key not in known}:
        error.add_note("; ".join(added.values()))  # for the traceback in the log
    if of is not None and "class" not in known:
        added["class"] = _definition(of if isinstance(of, type) else type(of))
    if added:
        setattr(error, _ATTRIBUTE, {**added, **known})


def _is_of_ray(error: SystemExit) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(traceback.tb_frame.f_globals.get("__name__")).startswith("ray.")


def _definition(made_by: type) -> str:
    """``FILE:LINE class NAME``; "" for a class whose source is not there."""
    try:
        return f"{inspect.getsourcefile(made_by)}:{inspect.getsourcelines(made_by)[1]} class {made_by.__qualname__}"
    except (OSError, TypeError):
        return ""


def _listed(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    rest = len(ids) - _SHOWN_EXAMPLES
    more = [f"… and {rest} more"] if rest > 0 else []
    return f"example{'s' * (len(ids) > 1)} {', '.join([*ids[:_SHOWN_EXAMPLES], *more])}"


def describe(error: BaseException, plugins: Sequence[Plugin], log: Path) -> str:
    """One line with the error and, as far as known, its plugin, file and line, its step, its examples, and the log.

    Args:
        error: with its traceback.
        plugins: of the trial.
        log: the trial's log.
    """
    known = _known(error)
    return _line(error, [known.get("step"), _place(error, plugins), known.get("examples"), f"log: {shown(log)}"])


def blamed(error: BaseException, registries: Iterable[Registry[Any]]) -> str | None:
    """``describe`` without a log, for an error outside of trials; None: no line of a plugin that is not ours had it.

    Args:
        error: with its traceback.
        registries: of all plugins.
    """
    entries = [entry for registry in registries for entry in registry.entries().values()]
    plugins = [
        Plugin(name=entry.name, distribution=Path(entry.distribution).name, result_version=1, target=entry.target)
        for entry in entries
        if entry.target.partition(".")[0] not in _OWN
    ]
    place = _place(error, plugins)
    known = _known(error)
    return _line(error, [known.get("step"), place, known.get("examples")]) if place.startswith("plugin ") else None


def _known(error: BaseException) -> dict[str, str]:
    """What ``during`` noted on an exception, or on one that it was made of, as a StopIteration in a generator is."""
    cause: BaseException | None = error
    while cause is not None:
        if known := getattr(cause, _ATTRIBUTE, None):
            return dict(known)
        cause = cause.__cause__
    return {}


def _line(error: BaseException, parts: Iterable[str | None]) -> str:
    message = f"{type(error).__name__}: {' '.join(_text(error).split())}"[:_MESSAGE_LENGTH]
    return f"{message} ({'; '.join(part for part in parts if part)})"


def _text(error: BaseException) -> str:
    """The text of an exception, which a class of a plugin may be unable to tell."""
    try:
        text = str(error)
    except Exception as other:
        return f"its text cannot be told: {type(other).__name__}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # the record is a file in UTF-8


def shown(path: Path) -> str:
    """The path relative to the working directory if it is below it, otherwise as it is."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _place(error: BaseException, plugins: Sequence[Plugin]) -> str:
    """``plugin NAME (DISTRIBUTION), FILE:LINE in FUNCTION``; without a plugin, the place in this repository."""
    frames: list[tuple[Path, str]] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += _frames(cause.__traceback__)
        cause = cause.__cause__
    sources = [(source, plugin) for plugin in plugins for source in _sources(plugin)]
    returned = _known(error).get("class", "")
    if returned:  # behind all lines that ran
        frames.append((Path(returned.rpartition(" class ")[0].rpartition(":")[0]), returned))
    for path, place in frames:
        for source, plugin in sources:
            if path == source or source in path.parents:
                return f"plugin {plugin.name} ({plugin.distribution}), {place}"
    if isinstance(error, UserError | FloatingPointError | MemoryError):
        return ""  # the message says what to change
    own = (place for path, place in frames if path.is_relative_to(_REPOSITORY) and path != Path(__file__))
    return returned or next(own, "")


def _frames(traceback: TracebackType | None) -> list[tuple[Path, str]]:
    """The files of a traceback with ``FILE:LINE in FUNCTION``, innermost first."""
    found = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append((Path(code.co_filename), f"{code.co_filename}:{traceback.tb_lineno} in {code.co_name}"))
        traceback = traceback.tb_next
    return found[::-1]


def _sources(plugin: Plugin) -> list[Path]:
    """The file that defines the plugin's class, and its modules: those beside a file, the package of a distribution."""
    module = plugin.target.rpartition(":")[0]
    if module.endswith(".py"):
        file = plugin_file(Path(module))
        return [file, *modules_beside(file)]
    package = module.partition(".")[0]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (module, package)]
    paths = [Path(file) for file in files if file]
    if package in _OWN or len(paths) < 2 or paths[1].name != "__init__.py":
        return paths[:1]
    return [paths[0], paths[1].parent]
