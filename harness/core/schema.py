"""The base of the schemas of files in a run folder, and reading such files."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Schema(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=BaseModel)
MOST_BYTES = 2**29  # of a JSON file of a run folder: a plan of a million trials has fewer


def read_strictly(schema: type[S], path: Path, what: str) -> S:
    """Read and validate a JSON file.

    Args:
        schema: of the file.
        path: the file.
        what: what the file should be, for the message, such as "a trial record".

    Raises:
        OSError: it cannot be read.
        ValueError: it does not match the schema; the message names the file and the location in it.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a device or a pipe has no end
        raise ValueError(f"{path}: not {what}: not a file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"{path}: not {what}: {status.st_size:,} bytes; allowed: at most {MOST_BYTES:,}")
    try:
        return schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: not {what}: {place}{': ' if place else ''}{first['msg']}") from error
