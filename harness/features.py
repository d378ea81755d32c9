"""What the language model sees of a file: the frozen encoder's output, computed once per trial and kept in memory.

Without augmentation a frozen encoder gives the same output in every epoch and for each of an example's references, so
nothing is lost by encoding a file once; past ``CACHE_BYTES`` files are encoded again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.backbones import Encoder
from tasks.base import Example, Modality

CACHE_BYTES = 1 << 30
BATCH_SIZE = 64  # files encoded at a time


class Features:
    """Encoder outputs of a task's examples.

    Args:
        modalities: context → modality, which reads the files.
        encoders: context → frozen encoder, which knows its own preprocessing.
        device: where the encoders run; what is kept lies in main memory.
    """

    def __init__(
        self, modalities: Mapping[str, Modality], encoders: Mapping[str, Encoder], device: torch.device
    ) -> None:
        self.modalities, self.device = modalities, device
        self.encoders = {context: encoder.to(device).eval() for context, encoder in encoders.items()}
        self._kept: dict[tuple[str, Path], Tensor] = {}
        self._bytes = 0

    def of(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Features (B, N, D) by context, one row per example, in main memory."""
        return {
            context: torch.stack(self._rows(context, [example.inputs[context] for example in examples]))
            for context in self.modalities
        }

    def keep(self, examples: Sequence[Example], tick: Callable[[], None]) -> None:
        """Encode ahead of use as many examples as fit into memory; ``tick`` is called after every batch."""
        for start in range(0, len(examples), BATCH_SIZE):
            if self._bytes >= CACHE_BYTES:
                return
            self.of(examples[start : start + BATCH_SIZE])
            tick()

    def _rows(self, context: str, paths: Sequence[Path]) -> list[Tensor]:
        rows = {path: self._kept[context, path] for path in paths if (context, path) in self._kept}
        missing = [path for path in dict.fromkeys(paths) if path not in rows]
        for start in range(0, len(missing), BATCH_SIZE):
            part = missing[start : start + BATCH_SIZE]
            for path, x_ND in zip(part, self._encode(context, part), strict=True):
                rows[path] = x_ND
                if self._bytes < CACHE_BYTES:
                    self._kept[context, path] = x_ND
                    self._bytes += x_ND.nbytes
        return [rows[path] for path in paths]

    @torch.no_grad()
    def _encode(self, context: str, paths: Sequence[Path]) -> list[Tensor]:
        encoder = self.encoders[context]
        items = [self.modalities[context].load(path) for path in paths]
        features_BND: Tensor = encoder(encoder.preprocess(items).to(self.device))
        return [x_ND.clone() for x_ND in features_BND.cpu()]
