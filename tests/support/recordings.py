"""Recordings that tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile


def sine(hertz: float, rate: int, seconds: float = 0.5) -> npt.NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def write_wav(path: Path, samples: npt.ArrayLike, rate: int = 16_000, subtype: str = "PCM_16") -> bytearray:
    soundfile.write(path, np.asarray(samples), rate, subtype=subtype, format="WAV")
    return bytearray(path.read_bytes())
