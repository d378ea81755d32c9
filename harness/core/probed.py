"""What a probe has measured of a shape, kept in the cache by its fingerprint and the device."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from pydantic import FiniteFloat

from harness.core.files import cache_folder, write_atomically
from harness.core.record import Memory
from harness.core.schema import Schema, read_strictly


class Probed(Schema):
    """A few training steps, scored references and generated texts of one trial, alone on the device.

    Attributes:
        device: as records name it.
        step_s: of optimizer steps, after the warm-up.
        reference_s: of scoring one reference.
        text_s: of generating one text.
        file_s: of encoding one input file; 0 where there are none.
        build_s: of loading the data and building the model.
        memory: by kind, as a record has it.
    """

    device: str
    step_s: tuple[FiniteFloat, ...]
    reference_s: FiniteFloat
    text_s: FiniteFloat
    file_s: FiniteFloat
    build_s: FiniteFloat
    memory: Memory


def _path(key: str, device: str) -> Path:
    return cache_folder("probes", f"{hashlib.sha256(f'{key} {device}'.encode()).hexdigest()[:32]}.json")


def keep(key: str, probed: Probed) -> None:
    """Keep what was measured of a shape."""
    write_atomically(_path(key, probed.device), probed.model_dump_json() + "\n")


def known(key: str, device: str) -> Probed | None:
    """What was measured of a shape on a device; None: nothing, or it cannot be read and is measured again."""
    with suppress(OSError, ValueError):
        return read_strictly(Probed, _path(key, device), "a probe")
    return None
