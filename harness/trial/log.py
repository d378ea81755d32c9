"""The log of a trial."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOG = "log.txt"  # in the trial's folder
_OWN_LOG = logging.getLogger("harness")


class _Patient(logging.FileHandler):
    """Loses lines where the disk is full, instead of ending the trial or printing a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Ignore an error of the disk."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file, also if what is left cannot be written."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_to(path: Path) -> Iterator[logging.Logger]:
    """Write the process's log, with Python's warnings, to the trial's file during the trial; yields a logger."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A plugin's message may have what is no character: without "errors" it would end the process.
    handler = _Patient(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"))
    root, level = logging.getLogger(), _OWN_LOG.level
    root.addHandler(handler)
    _OWN_LOG.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():  # a process that runs several trials shows a warning in each
            logging.captureWarnings(True)
            yield _OWN_LOG
    finally:
        logging.captureWarnings(False)
        _OWN_LOG.setLevel(level)
        root.removeHandler(handler)
        handler.close()
