"""A folder on a file system that several machines may share, such as NFS, with what a lease needs of it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from harness.core.storage import StorageError

_BLOCK_BYTES = 512  # small files have this size, so that they can be written again where a disk is full


class SharedFolder:
    """The small files of a folder. Nothing relies on locks, which some network file systems grant to everybody.

    Args:
        folder: the folder; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder)

    def files(self, below: str = "") -> dict[str, str]:
        """The files in one of its folders by name, each with what changes when its content does."""
        try:
            found = [path for path in (self.folder / below).iterdir() if path.is_file()]
            return {path.relative_to(self.folder).as_posix(): str(path.stat().st_mtime_ns) for path in found}
        except FileNotFoundError:  # no such folder, or a file that was removed just now
            return {} if not (self.folder / below).is_dir() else self.files(below)
        except OSError as error:
            raise self._unusable(below, "listed", error) from error

    def read(self, name: str) -> bytes | None:
        """The content of a file; None: there is none."""
        try:
            return (self.folder / name).read_bytes().rstrip(b" ")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(name, "read", error) from error

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file if there is none; of several who do so at once, also on several machines, one gets True.

        A link is made in one step and with all of the content. Where there are no links, opening the file makes it.
        """
        path = self.folder / name
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(content.ljust(_BLOCK_BYTES))
            try:
                path.hardlink_to(new)
            except FileExistsError:
                return new.stat().st_nlink > 1  # NFS may say so of its own link, when its answer was lost
            except OSError:
                return _created(path, content)
            return True
        except OSError as error:
            raise self._unusable(name, "written", error) from error
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file that exists, in its place: a full disk has no room for another one."""
        try:
            descriptor = os.open(self.folder / name, os.O_WRONLY)
            try:
                os.pwrite(descriptor, content.ljust(_BLOCK_BYTES), 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unusable(name, "written", error) from error

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise self._unusable(name, "removed", error) from error

    def _unusable(self, name: str, done: str, error: OSError) -> StorageError:
        return StorageError(f"{self.folder / name}: could not be {done}: {error.strerror or error}")


def _created(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(content.ljust(_BLOCK_BYTES))
    except FileExistsError:
        return False
    return True
