"""Whether an error means that there was not enough memory: libraries say it in many ways."""

from __future__ import annotations

import errno
import re

# PyTorch's allocator of main memory, CUDA, cuBLAS, the C++ library, and the kernel where a process cannot be forked.
_TOLD = re.compile(
    r"can't allocate memory|out of memory|cannot allocate memory|std::bad_alloc|not enough memory|ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, is a lack of main memory or of a GPU's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and _TOLD.search(str(cause)):
            return True
        cause = cause.__cause__
    return False
