"""What is known of input files: that they decode, and the SHA-256 of their content, remembered by size and time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.errors import UserError
from harness.core.files import digest_of, write_atomically

if TYPE_CHECKING:
    from tasks.base import Modality
    from tasks.encoder import Encoder

FILE_NAME = "inputs.json"


@dataclass(frozen=True)
class Reader:
    """How a file is read: decoded by its modality, and found fit by the encoders it is for.

    Attributes:
        name: of the modality and its encoders, in words: readers of one name do the same.
        modality: decodes.
        encoders: without weights; none where no experiment names one.
    """

    name: str
    modality: Modality
    encoders: tuple[Encoder, ...] = ()

    def read(self, path: Path) -> str | None:
        """Read the whole file; return the modality's remark.

        Raises:
            UserError: it cannot be read, whatever its decoder fails with; the message names the file.
        """
        try:
            if path.stat().st_size == 0:
                raise UserError(f"{path}: the file is empty (0 bytes)")
            item = self.modality.load(path)
            for encoder in self.encoders:
                if reason := encoder.check(item):
                    raise UserError(f"{path}: {reason}")
            return self.modality.remark(item)
        except UserError:
            raise
        except Exception as error:  # plugins are anybody's, and one file must not hide what is wrong with the others
            raise UserError(f"{path}: cannot be read as {self.name}: {type(error).__name__}: {error}") from error


class Inputs:
    """The input files of a run folder, as ``inputs.json`` remembers them.

    Reading a large data set takes minutes, so the driver reads every file once and the trials use what it found.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FILE_NAME
        self._known: dict[str, list[object]] = {}
        if self.path.exists():
            self._known = json.loads(self.path.read_text(encoding="utf-8"))

    def is_read(self, path: Path, reader: Reader) -> bool:
        """Whether the file was read since it was last changed, and by this reader: another encoder may refuse it."""
        known = self._known.get(str(path), [])
        return reader.name in known[3:] and path.exists() and known[:2] == _stamp(path)

    def read(self, path: Path, reader: Reader) -> None:
        """Read a file and remember its digest.

        Raises:
            UserError: it cannot be read.
        """
        reader.read(path)
        known = self._known.get(str(path), [])
        others = known[3:] if known[:2] == _stamp(path) else []
        self._known[str(path)] = [*_stamp(path), digest_of(path), *dict.fromkeys([*others, reader.name])]

    def save(self) -> None:
        """Write ``inputs.json``."""
        write_atomically(self.path, json.dumps(self._known))

    def digest(self, path: Path) -> str:
        """SHA-256 of the file's content: remembered, or computed now if the file is not known or has changed."""
        known = self._known.get(str(path), [])
        return str(known[2]) if known[:2] == _stamp(path) else digest_of(path)


def _stamp(path: Path) -> list[object]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
