"""A decoded recording: what the audio modality gives to its encoders. Shapes: S samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SAMPLING_RATE = 16_000  # Hz: what speech encoders are trained on


@dataclass(frozen=True, eq=False)
class Recording:
    """A decoded recording, and what it was before."""

    samples: npt.NDArray[np.float32]  # (S,), mono, at SAMPLING_RATE; full scale of integer formats is [-1, 1]
    original_rate: int = SAMPLING_RATE  # Hz
    channels: int = 1

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / SAMPLING_RATE
