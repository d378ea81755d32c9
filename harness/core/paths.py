"""Paths in an experiment: relative to its file, and stored as they are written there.

A spec holds a path as the experiment has it (``data/coco``), so that trial ids and what must match between trials do
not depend on where the experiment lies on this machine, and beside it the folder that its relative paths start from. A
path is located when the options that contain it are made: plugins use it as it is.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path, PosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, ValidationInfo, WithJsonSchema

from harness.core import hub

_FOLDER, _EXPLAIN = "relative_to", "explain"  # keys of a validation context


def relative_to(folder: str | Path | None, explain: bool = False) -> dict[str, Any]:
    """The pydantic validation context with which an ``ExperimentPath`` starts from this folder.

    Args:
        folder: of the experiment file; None: the current folder.
        explain: whether a path that exists only in the current folder is an error.
    """
    return {_FOLDER: Path(folder) if folder is not None else None, _EXPLAIN: explain}


def locate(written: str | Path, folder: Path, explain: bool = False) -> Path:
    """Where a path of an experiment leads; ``~`` is expanded.

    Args:
        written: as in the experiment.
        folder: of the experiment file.
        explain: whether a path that exists only in the current folder is an error.

    Raises:
        ValueError: ``explain``, and the path exists in the current folder only; the message says what to write.
    """
    found = folder / Path(written).expanduser()
    if explain and not _exists(found) and _exists(Path(written)):
        raise ValueError(only_here(written, folder))
    return found


def only_here(written: str | Path, folder: Path) -> str:
    """The message for a path that exists in the current folder, but not in that of the experiment file."""
    instead = os.path.relpath(Path.cwd().resolve() / written, folder.resolve())
    return (
        f"{str(written)!r} is in the current folder ({Path.cwd()}), but not in the folder of the experiment file "
        f"({folder}), from which its relative paths start; write {instead!r}, or an absolute path"
    )


def folder_of(info: ValidationInfo) -> Path:
    """The folder that relative paths start from, in a validator of options that are text: names and patterns."""
    return (info.context or {}).get(_FOLDER) or Path()


def _explains(info: ValidationInfo) -> bool:
    return bool((info.context or {}).get(_EXPLAIN))


def locate_pattern(written: str, folder: Path) -> str:
    """Where a pattern of paths (``shards/*.tar``) leads, as a pattern; ``~`` is expanded."""
    return str(Path(glob.escape(str(folder)), Path(written).expanduser()))


def check_pattern(written: str, info: ValidationInfo) -> None:
    """Check a path or a pattern of paths, in a validator.

    Raises:
        ValueError: it leads to something from the current folder only; the message says what to write.
    """
    if _explains(info) and not _matches(locate_pattern(written, folder_of(info))) and _matches(written):
        raise ValueError(only_here(written, folder_of(info)))


def locate_model(written: str, folder: Path) -> str:
    """A model's name with the path of its folder; built-in names and hub ids are unchanged.

    A name without ``./`` is a folder if there is one of this name in the folder of the experiment file.
    """
    if hub.is_builtin(written) or not (written.startswith((".", "~", "/")) or _is_folder(folder / written)):
        return written
    return str(locate(written, folder))


def check_model(written: str, folder: Path) -> None:
    """Check that a model's name does not change its meaning with the current folder.

    Raises:
        ValueError: it is a folder here, but not in the folder of the experiment file; or a hub id with a revision, and
            a folder of the id's name is here, which ``from_pretrained`` would read instead.
    """
    if hub.is_builtin(written) or _is_folder(folder / Path(written).expanduser()):
        return
    elsewhere = "for the hub's model of this name, call harness from another folder"
    if _is_folder(Path(written)):
        hint = "" if written.startswith(".") else f"; {elsewhere}"
        raise ValueError(f"{only_here(written, folder)}{hint}")
    name = written.partition("@")[0]
    if name != written and _is_folder(Path(name)):
        raise ValueError(f"the current folder ({Path.cwd()}) has a folder {name!r}, which would be read; {elsewhere}")


class _Located(PosixPath):
    """A path that knows how the experiment has it; paths made from it are plain."""

    written: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _located, (str(self), self.written)


def _located(path: str | Path, written: str | None) -> _Located:
    found = _Located(path)
    found.written = written
    return found


def _locate(value: Path, info: ValidationInfo) -> Path:
    return _located(locate(value, folder_of(info), _explains(info)), str(value))


def _as_written(value: Path) -> str:
    return getattr(value, "written", None) or str(value)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name, no permission
        return False


def _matches(pattern: str) -> bool:
    return next(glob.iglob(pattern, recursive=True), None) is not None  # noqa: PTH207 - absolute ones too


def _is_folder(path: Path) -> bool:
    return _exists(path) and path.is_dir()


# A file or folder in the options of a task or an adapter method. In an experiment it is relative to the experiment's
# file; elsewhere to the current folder. The plugin gets where it leads, with ``~`` expanded.
ExperimentPath = Annotated[
    Path,
    AfterValidator(_locate),
    PlainSerializer(_as_written, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path"}),
]
