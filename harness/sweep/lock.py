"""Locks a run folder: one sweep or profile at a time, on all machines that see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.lease import Lease, leased
from harness.core.shared_folder import SharedFolder
from harness.core.storage import Folder, url_of
from harness.sweep.stopping import REQUEST


@contextmanager
def exclusive(folder: Path, note: Callable[[str], None] = lambda _: None) -> Iterator[Lease]:
    """Lock a run folder against other sweeps and profiles.

    Args:
        folder: the run folder. If it is the copy of one at a URL, that one's lease is held too.
        note: told that it is waited for another holder of the lease.

    Yields:
        The lease: that of the URL, if there is one.

    Raises:
        UserError: a sweep or profile is running in it.
    """
    with _locked(folder), leased(SharedFolder(folder), None, note) as own:
        if url := url_of(folder):
            there = Folder(url)

            def look_for_request() -> None:
                if request := there.read(REQUEST):
                    write_atomically(folder / REQUEST, request.decode())

            with leased(there, folder, note, look_for_request) as lease:
                there.remove([REQUEST])  # an older one
                yield lease
        else:
            yield own


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the system's lock of a folder, where the file system has such locks.

    The lease alone keeps other machines out. The lock is certain for the processes of this one, in all containers.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: in use by another sweep or profile; wait until it has ended, or `harness run --fresh`"
        ) from None
    except (NotImplementedError, OSError):  # some network file systems have none
        yield
        return
    try:
        yield
    finally:
        lock.release()
