"""Files that are made once for all processes of a machine: capped, checked by their digest, the least used go first.

A file's name ends with the SHA-256 of its content, so that a flipped byte or a lost end is seen, and names what it is
for before that. Files are written atomically and never changed. A file's modification time is when it was last used.
Who uses files is written down in a file that the user's process holds a lock of, which the system frees when it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import time
import uuid
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO

from filelock import FileLock

from harness.core.errors import UserError
from harness.core.files import atomic, remove_abandoned
from harness.core.forecast import GIB

_DIGEST = 32  # hexadecimal digits of a name
_LOCKS, _USES = ".locks", ".uses"
_PROBE_BYTES = 1 << 20
logger = logging.getLogger(__name__)


class CacheFullError(UserError):
    """What running trials use takes all that a cache may take."""


class DiskCache:
    """A folder of such files.

    Args:
        folder: made when the first file is written.
        limit_bytes: of all files together.
        change: what would give it another place or size, for messages.
    """

    def __init__(self, folder: Path, limit_bytes: int, change: str) -> None:
        self.folder, self.limit_bytes, self.change = folder, limit_bytes, change

    def check(self, needed_bytes: int = 0) -> None:
        """Check that files can be written, and that there is room for so many bytes.

        Raises:
            UserError: not; the message says what would work.
        """
        if needed_bytes > self.limit_bytes:
            raise UserError(
                f"{self.folder}: about {needed_bytes / GIB:.2f} GiB are needed, and the cache may take "
                f"{self.limit_bytes / GIB:.2f} GiB; {self.change}"
            )
        probe = self.folder / f".write-test.{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(bytes(_PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror or error}; {self.change}") from error
        found = os.statvfs(self.folder)
        free = found.f_bavail * found.f_frsize
        if needed_bytes > free + self.size_bytes:
            raise UserError(
                f"{self.folder}: about {needed_bytes / GIB:.2f} GiB are needed, and its disk has {free / GIB:.2f} GiB "
                f"free; free some, or {self.change}"
            )

    def files(self, prefix: str) -> list[Path]:
        """The files whose names begin so; a link is none of them."""
        start = self.folder / prefix
        try:
            with os.scandir(start.parent) as entries:
                found = [e.name for e in entries if e.name.startswith(f"{start.name}-")]
        except FileNotFoundError:
            return []
        return [start.with_name(name) for name in sorted(found)]

    def lock(self, name: str) -> FileLock:
        """A lock that one process holds at a time; the system frees it if the process dies."""
        path = self.folder / _LOCKS / f"{hashlib.sha256(name.encode()).hexdigest()[:_DIGEST]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def add(self, prefix: str, content: bytes, suffix: str) -> Path:
        """Write a file; the least recently used ones that nobody uses make room for it.

        Raises:
            CacheFullError: there is no room for it.
            DiskFullError: the disk is full.
        """
        path = self.folder / f"{prefix}-{hashlib.sha256(content).hexdigest()[:_DIGEST]}{suffix}"
        with self.lock("all"):
            self._make_room(len(content))
            with atomic(path) as partial:
                partial.write_bytes(content)
        return path

    def remove_broken(self, path: Path, why: str) -> None:
        """Remove a file that is not what was written, so that it is made again, and say so in the log."""
        logger.warning("%s: %s; it is removed and made again", path, why)
        with suppress(OSError):  # another process was faster; or it is a folder, which stays and is not looked at
            path.unlink()

    def _make_room(self, size_bytes: int) -> None:
        remove_abandoned(self.folder, "**/.*.partial")
        known = self._known()
        excess = sum(size for _, size, _ in known) + size_bytes - self.limit_bytes
        if excess <= 0:
            return
        used, going = self._used(), list[Path]()
        for _, size, path in sorted(known):
            if excess > 0 and path not in used:
                going.append(path)
                excess -= size
        if excess > 0:
            limit = f"{self.limit_bytes / GIB:.2f} GiB"
            raise CacheFullError(f"{self.folder}: what running trials use takes all of its {limit}; {self.change}")
        for path in going:
            path.unlink(missing_ok=True)

    def _known(self) -> list[tuple[int, int, Path]]:
        """When each file was last used, its size, and the file."""
        found = []
        for place, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (Path(place) / name for name in names if not name.startswith(".")):
                with suppress(FileNotFoundError):
                    state = path.lstat()
                    found.append((state.st_mtime_ns, state.st_size, path))
        return found

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size, _ in self._known())

    def _used(self) -> set[Path]:
        """The files that living processes use."""
        found: set[Path] = set()
        for path in (self.folder / _USES).glob("*"):
            with suppress(FileNotFoundError), path.open("r+", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()  # its process is dead
                except BlockingIOError:
                    found.update(self.folder / line for line in file.read().splitlines())
        return found


class Use:
    """The files of a cache that one user, such as a trial, has opened; they stay until it is closed or collected."""

    def __init__(self, cache: DiskCache) -> None:
        self.cache = cache
        self._path = Path()
        self._file: IO[str] | None = None

    def take(self, path: Path) -> bool:
        """Use a file of the cache from now on; False: it was broken, and was removed.

        Its content is read once, to compare its digest with its name.
        """
        with self.cache.lock("all"):
            if self._file is None:  # named here, so that copies of a process do not share one
                self._path = self.cache.folder / _USES / uuid.uuid4().hex
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8")
                fcntl.flock(self._file, fcntl.LOCK_EX)
            self._file.write(f"{path.relative_to(self.cache.folder)}\n")
            self._file.flush()
            with suppress(OSError):
                os.utime(path, ns=(now := time.time_ns(), now), follow_symlinks=False)
        if (why := _broken(path)) is not None:
            self.cache.remove_broken(path, why)
            return False
        return True

    def close(self) -> None:
        """Use nothing any more."""
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read, unless it is a link or anything but a file.

    Raises:
        OSError: it is, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return os.fdopen(descriptor, "rb")


def _broken(path: Path) -> str | None:
    """Why a file is not what was written; None: it is."""
    try:
        with open_regular(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:_DIGEST]
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if found == path.stem.rpartition("-")[2] else "its checksum is another one, so it is corrupted"
