"""The files that a run reads, as they were when it read them, so that ``harness status`` says which are others now.

They are data that options of a task name, models, and plugins. Files are compared by size and time of change: whether
the examples differ is known once they are read, which ``harness run`` does.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import hub
from harness.core.beside import modules_beside
from harness.core.files import write_atomically
from harness.core.paths import locate_model
from harness.core.schema import Schema, read_strictly
from harness.core.weights import models_of
from harness.experiment.shared import distinct

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec

FILE_NAME = "input_files.json"  # in the run folder
_LIMIT_S = 1.0  # how long ``harness status`` looks at files
_MOST_LINES = 20
_ASK = "`harness run` says whether examples, models or plugins are others"


class Named(Schema):
    """A file or a folder that the experiment names.

    Attributes:
        key: where it is named, such as ``task.root``.
        path: absolute, with the links in it.
        files: how many there are, of a folder with those below it.
        digest: of their names, sizes and times of change.
    """

    key: str
    path: str
    files: int
    digest: str


class InputFiles(Schema):
    """``input_files.json``.

    Attributes:
        host: the machine that read them.
        named: each path once.
    """

    host: str
    named: tuple[Named, ...]


class _OutOfTimeError(Exception):
    """Looking at files takes too long."""


def named_paths(specs: Sequence[TrialSpec]) -> dict[Path, str]:
    """By path the key of every file or folder that the trials name: data of their tasks, models, trained adapters."""
    found: dict[Path, str] = {}
    for spec in distinct(specs, "task", "backbone", "adapter", "relative_to"):
        sources = {part: source.trial for part, source in spec.adapter.init_from.items()}
        for key, value in _texts({"task": spec.task.config, "adapters.init_from": sources}):
            found.setdefault(spec.folder / value, key)
        for key, (name, _) in models_of(spec.backbone.model_dump(mode="json")).items():
            folder = Path(hub.resolve(locate_model(name, spec.folder)))
            if folder.is_absolute() and not hub.is_builtin(name):  # else the id of a model on the hub
                found.setdefault(folder, f"backbone.{key}")
    return {path: key for path, key in found.items() if path != path.parent and _exists(path)}  # "/" is no path


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in options, with its dotted key."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str) and value:
        yield key, value


def lines_of(path: Path, runs: Path, until: float | None = None) -> Iterator[str]:
    """Path, size and time of change of a file, or of every file in a folder or below it, in order.

    Args:
        path: of the file or folder.
        runs: the parent of the run folder, which is left out.
        until: of ``time.monotonic()``, when to give up.

    Raises:
        OSError: it cannot be read.
        _OutOfTimeError: ``until`` has come.
    """
    for file in [path] if path.is_file() else _files(path, runs.resolve(), until):
        _check_time(until)
        stat = file.stat()
        yield f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def see_files(specs: Sequence[TrialSpec], plugins: Iterable[Path], run: Path) -> InputFiles:
    """How the files are now.

    Args:
        specs: of the trials.
        plugins: plugin files; the modules that they import from their folders are seen too.
        run: the run folder.
    """
    code = [file for path in plugins if path.is_file() for file in (path, *modules_beside(path))]
    paths = {**dict.fromkeys(code, "plugins"), **named_paths(specs)}
    named: dict[str, Named] = {}
    for path, key in paths.items():
        plain = Path(os.path.normpath(path.absolute()))
        place = plain if plain == path.resolve() else path.absolute()  # with its links: they may lead elsewhere later
        files, digest = _state(place, run.parent)
        named[str(place)] = Named(key=key, path=str(place), files=files, digest=digest)
    return InputFiles(host=socket.gethostname(), named=tuple(named.values()))


def keep_files(run: Path, seen: InputFiles, changed: Sequence[str]) -> None:
    """Write down how the files are that a run has read.

    Args:
        run: the run folder.
        seen: before they were read.
        changed: what was said of examples that differ from those of finished trials; if any, what was written for
            these stays.
    """
    kept = _read(run).named if changed and (run / FILE_NAME).exists() else ()
    before = {item.path: item for item in kept}
    named = tuple(before.get(item.path, item) for item in seen.named)
    write_atomically(run / FILE_NAME, seen.model_copy(update={"named": named}).model_dump_json(indent=1) + "\n")


def changed_files(run: Path) -> list[str]:
    """A line for each file or folder that is no longer as it was when the run read it; nothing is read but its state.

    Args:
        run: the run folder.
    """
    try:
        known = _read(run)
    except FileNotFoundError:  # nothing has been read yet, or by an earlier version
        return []
    except (OSError, ValueError) as error:
        return [str(error)]
    elsewhere = "" if known.host == socket.gethostname() else f", or not on this machine: {known.host} read it"
    lines: list[str] = []
    until = time.monotonic() + _LIMIT_S
    for number, item in enumerate(known.named):
        if len(lines) == _MOST_LINES or (number and time.monotonic() > until):
            return [*lines, f"{len(known.named) - number} other files or folders were not looked at; {_ASK}"]
        if (line := _change(item, run, until, elsewhere)) is not None:
            lines.append(line)
    return lines


def _change(item: Named, run: Path, until: float, elsewhere: str) -> str | None:
    """What to say of a file or folder, if anything."""
    path = Path(item.path)
    try:
        if not path.is_absolute():
            return f"{item.key}: {path} in {run / FILE_NAME} is no absolute path"
        if not _exists(path):
            return f"{item.key}: {path} is gone{elsewhere}"
        what, which = (f"{path} has", "it") if path.is_file() else (f"files in {path} have", "them")
        if _state(path, run.parent, until) != (item.files, item.digest):
            return f"{item.key}: {what} changed since this run read {which}; {_ASK}"
    except _OutOfTimeError:
        return f"{item.key}: {path}: {item.files} files take too long to look at; {_ASK}"
    except OSError as error:
        return f"{item.key}: {error}"
    return None


def _exists(path: Path) -> bool:
    try:
        return path.is_file() or path.is_dir()
    except (OSError, ValueError):  # no path: a template with a NUL, a text that is too long
        return False


def _state(path: Path, runs: Path, until: float | None = None) -> tuple[int, str]:
    """How many files, and the digest of their states."""
    digest, count = hashlib.sha256(), 0
    for line in lines_of(path, runs, until):
        digest.update(f"{len(line)} {line}\n".encode("utf-8", "surrogatepass"))
        count += 1
    return count, digest.hexdigest()


def _read(run: Path) -> InputFiles:
    return read_strictly(InputFiles, run / FILE_NAME, "what a run has read")


def _files(folder: Path, runs: Path, until: float | None) -> Iterator[Path]:
    """Every file in a folder or below it, through links too, each folder once."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        _check_time(until)
        real = os.path.realpath(here)
        if real in seen or real == str(runs):
            folders.clear()
            continue
        seen.add(real)
        place = Path(here)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        yield from (place / name for name in sorted(files) if (place / name).exists())


def _check_time(until: float | None) -> None:
    if until is not None and time.monotonic() > until:
        raise _OutOfTimeError
