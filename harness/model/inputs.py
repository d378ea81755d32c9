"""Checks that input files can be decoded, and caches this and their SHA-256 by size and modification time."""

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
    """Reads and checks files: the modality decodes them, and the encoders check the result.

    Attributes:
        name: of the modality, its plugin and its encoders; readers with the same name behave identically.
        modality: decodes the files.
        encoders: encoders without weights that check what was decoded.
    """

    name: str
    modality: Modality
    encoders: tuple[Encoder, ...] = ()

    def read(self, path: Path) -> str | None:
        """Read and check the whole file; returns the modality's remark on it, if any.

        Raises:
            UserError: it cannot be decoded or an encoder does not accept it; the message names the file.
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
        except Exception as error:  # plugins may raise any type, and errors in other files must be reported too
            raise UserError(f"{path}: cannot be read as {self.name}: {type(error).__name__}: {error}") from error


class Inputs:
    """The checked input files of a run folder, cached in its ``inputs.json``.

    Reading a large data set takes minutes, so the driver reads every file once, and trials use the cached digests.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FILE_NAME
        self._known: dict[str, list[object]] = {}
        if self.path.exists():
            self._known = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def paths(self) -> list[Path]:
        """The files that have been read."""
        return list(map(Path, self._known))

    def is_read(self, path: Path, reader: Reader) -> bool:
        """Whether this reader has read the file since it last changed; another encoder may not accept it."""
        known = self._known.get(str(path), [])
        return reader.name in known[3:] and path.exists() and known[:2] == stamp(path)

    def read(self, path: Path, reader: Reader) -> None:
        """Read and check a file, and cache its digest.

        Raises:
            UserError: it cannot be read.
        """
        reader.read(path)
        known = self._known.get(str(path), [])
        others = known[3:] if known[:2] == stamp(path) else []
        self._known[str(path)] = [*stamp(path), digest_of(path), *dict.fromkeys([*others, reader.name])]

    def save(self) -> None:
        """Write ``inputs.json``."""
        write_atomically(self.path, json.dumps(self._known))

    def digest(self, path: Path) -> str:
        """SHA-256 of the file's content: from the cache, or computed if the file is new or has changed."""
        known = self._known.get(str(path), [])
        return str(known[2]) if known[:2] == stamp(path) else digest_of(path)


def stamp(path: Path) -> list[object]:
    """What changes with a file's content: its size and modification time.

    Raises:
        OSError: there is no such file.
    """
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]
