"""The folders and files of a data set: what must exist, and what the names in annotations may lead to.

One policy for all tasks: a name is relative to its folder and stays in it (no ``..``, no absolute path), so that the
author of annotations cannot name files outside the data set. Symbolic links in a data set that the user named are
followed wherever they lead: whoever set up the folder made them (pictures on another disk, the hub's cache).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from harness.core.errors import UserError, did_you_mean


def require_folder(folder: Path, what: str) -> None:
    """Check that a folder exists.

    Raises:
        UserError: it does not, or is a file; the message names the folders next to the first missing one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: the folder of {what} {_missing(folder, folders=True)}")


def require_file(path: Path, what: str) -> None:
    """Check that a file exists.

    Raises:
        UserError: it does not, or is a folder; the message names the files beside it with the same suffix.
    """
    if not path.is_file():
        raise UserError(f"{path}: the {what} {_missing(path, folders=False)}")


def _missing(path: Path, folders: bool) -> str:
    if path.exists():
        return "is a file; allowed: a folder" if folders else "is a folder; allowed: a file"
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    name = path.absolute().relative_to(parent).parts[0]
    if folders or parent != path.absolute().parent:
        present = (entry.name for entry in parent.iterdir() if entry.is_dir())
    else:
        present = (entry.name for entry in parent.iterdir() if entry.suffix == path.suffix)
    return f"does not exist; in {parent} {nearest(name, present)}"


def or_compressed(path: Path) -> Path:
    """The path, or that of the same file with ``.gz`` behind its name if only this one exists."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if not path.exists() and packed.is_file() else path


def nearest(found: str, present: Iterable[str]) -> str:
    """As ``did_you_mean``, but only the ten nearest names: a folder may hold thousands."""
    return did_you_mean(found, get_close_matches(found, list(present), n=10, cutoff=0))


def leaves_folder(name: str) -> bool:
    """Whether a relative name or pattern leads out of its folder, links aside."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


class MissingFileError(UserError):
    """An annotation names a file that does not exist."""


class DataFiles:
    """Finds the files that annotations name, without leaving the data set."""

    def __init__(self) -> None:
        self._real: dict[Path, Path] = {}  # folder → with its links resolved

    def find(self, folder: Path, name: str, where: str) -> Path:
        """The path of an existing file; links are followed.

        Args:
            folder: what the name is relative to.
            name: as the annotation gives it.
            where: the beginning of an error message.

        Raises:
            MissingFileError: it does not exist.
            UserError: it is outside the folder, or cannot be reached.
        """
        if leaves_folder(name):
            raise UserError(f"{where}: {name!r} leads out of {folder}; allowed: files inside it")
        path = folder / name
        try:
            if not path.is_file():
                link = f"; it is a link to {path.readlink()}" if path.is_symlink() else ""
                raise MissingFileError(f"{where}: {name!r} is not in {folder}{link}")
        except (OSError, ValueError, RuntimeError) as error:  # no permission, too long a name, a loop of links
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{where}: {name[:80]!r} in {folder} cannot be read: {reason}") from error
        return path

    def real(self, path: Path) -> Path:
        """The path with links resolved; of each folder once, because resolving costs ten times as much as finding."""
        return path.resolve() if path.is_symlink() else self._real_folder(path.parent) / path.name

    def _real_folder(self, folder: Path) -> Path:
        if folder not in self._real:
            self._real[folder] = folder.resolve()
        return self._real[folder]
