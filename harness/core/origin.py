"""Says where an error comes from: the plugin, its file and line, the step of a trial, and the examples."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from harness.core.errors import UserError
from harness.core.registry import Plugin, plugin_file

_SHOWN_EXAMPLES = 8
_MESSAGE_LENGTH = 500
_ATTRIBUTE = "harness_origin"  # of an exception: what was done, and the ids of the examples
_REPOSITORY = Path(__file__).parents[2]
_OWN = {"adapters", "harness", "results", "tasks"}  # packages with the built-in plugins, and much that is none


@contextmanager
def during(step: str = "", examples: Iterable[str] = ()) -> Iterator[None]:
    """Note on an exception what was being done; the innermost step and the innermost examples are kept.

    Args:
        step: such as "encoder of modality image".
        examples: ids of the examples in this step.
    """
    try:
        yield
    except Exception as error:
        known: dict[str, str] = getattr(error, _ATTRIBUTE, {})
        new = {key: text for key, text in (("step", step), ("examples", _listed(list(examples)))) if text}
        if added := {key: text for key, text in new.items() if key not in known}:
            setattr(error, _ATTRIBUTE, {**added, **known})
            error.add_note("; ".join(added.values()))  # for the traceback in the log
        raise


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
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MESSAGE_LENGTH]
    known: dict[str, str] = getattr(error, _ATTRIBUTE, {})
    parts = [known.get("step"), _place(error, plugins), known.get("examples"), f"log: {shown(log)}"]
    return f"{message} ({'; '.join(part for part in parts if part)})"


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
    for path, place in frames:
        for source, plugin in sources:
            if path == source or source in path.parents:
                return f"plugin {plugin.name} ({plugin.distribution}), {place}"
    if isinstance(error, UserError | FloatingPointError | MemoryError):
        return ""  # the message says what to change
    own = (place for path, place in frames if path.is_relative_to(_REPOSITORY) and path != Path(__file__))
    return next(own, "")


def _frames(traceback: TracebackType | None) -> list[tuple[Path, str]]:
    """The files of a traceback with ``FILE:LINE in FUNCTION``, innermost first."""
    found = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        found.append((Path(code.co_filename), f"{code.co_filename}:{traceback.tb_lineno} in {code.co_name}"))
        traceback = traceback.tb_next
    return found[::-1]


def _sources(plugin: Plugin) -> list[Path]:
    """The file that defines the plugin's class; of another distribution, also the folder of its package."""
    module = plugin.target.rpartition(":")[0]
    if module.endswith(".py"):
        return [plugin_file(Path(module))]
    package = module.partition(".")[0]
    files = [getattr(sys.modules.get(name), "__file__", None) for name in (module, package)]
    paths = [Path(file) for file in files if file]
    if package in _OWN or len(paths) < 2 or paths[1].name != "__init__.py":
        return paths[:1]
    return [paths[0], paths[1].parent]
