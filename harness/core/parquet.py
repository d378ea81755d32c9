"""Reading Parquet files that may be somebody else's: a file of a few bytes can say that it has billions of rows."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

MOST_BYTES = 4 * 2**30  # that reading one file may take
_STATM = Path("/proc/self/statm")


@contextmanager
def bounded(path: Path) -> Iterator[None]:
    """Read a file within, and get an error instead of all memory of the machine; where the system has such a limit.

    Raises:
        pyarrow.ArrowMemoryError: reading it takes more than ``MOST_BYTES``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + MOST_BYTES
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *limits]), hard))
    try:
        yield
    except MemoryError as error:
        raise pa.ArrowMemoryError(f"{path}: reading it takes more than {MOST_BYTES / 2**30:g} GiB") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int:
    """Of this process, in bytes; 0 where the system does not tell, and has no such limit either."""
    try:
        pages = int(_STATM.read_bytes().split()[0])
    except OSError:
        return 2**62
    return pages * os.sysconf("SC_PAGE_SIZE")
