"""Where a Ray that a sweep starts keeps its sockets and logs: a folder that only this user can enter.

Ray's own default, ``/tmp/ray``, is open to every user of the machine and is never emptied.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.core.errors import UserError

_PREFIX = "harness-"
# Ray's longest socket, below the temporary folder; the kernel limits a socket's path (man 7 unix).
_SOCKET = f"{_PREFIX}xxxxxxxx/ray/session_2026-01-01_00-00-00_000000_{{pid}}/sockets/plasma_store"
_MAX_SOCKET_BYTES = 107


def temporary_folder() -> tuple[str, Path]:
    """The folder for temporary files, and the environment variable that names it, in Ray's order."""
    name = next((key for key in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(key)), "TMPDIR")
    return name, Path(os.environ.get(name) or "/tmp")  # noqa: S108 - Ray's default


def check_length() -> None:
    """Check that the paths of Ray's sockets are not too long.

    Raises:
        UserError: they are; the message names the environment variable.
    """
    name, temporary = temporary_folder()
    if (size := len(os.fsencode(temporary / _SOCKET.format(pid=os.getpid())))) > _MAX_SOCKET_BYTES:
        allowed = len(os.fsencode(temporary)) - (size - _MAX_SOCKET_BYTES)
        raise UserError(
            f"{name}={temporary}: too long for Ray, which makes sockets below it; allowed: a path of at most {allowed} "
            "bytes; set RAY_TMPDIR to a short folder such as /tmp"
        )


@contextmanager
def ray_folder() -> Iterator[Path]:
    """A folder for Ray, removed at the end; after an unexpected error it is kept, because its logs may say why."""
    private = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=temporary_folder()[1]))
    try:
        yield private / "ray"  # Ray opens the folder that it is given to everybody, but nobody gets there
    except (KeyboardInterrupt, UserError):
        shutil.rmtree(private, ignore_errors=True)
        raise
    shutil.rmtree(private, ignore_errors=True)
