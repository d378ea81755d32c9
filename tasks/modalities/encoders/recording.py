"""A decoded recording: what the audio modality passes to its encoders. Shapes: S samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SAMPLING_RATE = 16_000  # Hz: what speech encoders are trained on


@dataclass(frozen=True, eq=False)
class Recording:
    """A decoded recording, and its original rate and channels."""

    samples: npt.NDArray[np.float32]  # (S,), mono, at SAMPLING_RATE; full scale of integer formats is [-1, 1]
    original_rate: int = SAMPLING_RATE  # Hz
    channels: int = 1

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / SAMPLING_RATE
