"""Examples → batches: the features of their inputs, and their targets as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.backbones import LanguageModel
from harness.features import Features
from harness.model import IGNORED, Batch
from tasks.base import Example


class BatchMaker:
    """Makes batches of one task for one set of backbones.

    Args:
        features: of the examples' inputs.
        language_model: for its tokenizer.
        max_target_length: tokens of a target before EOS; longer ones are cut and counted in ``cut_targets``.
    """

    def __init__(self, features: Features, language_model: LanguageModel, max_target_length: int) -> None:
        self.features, self.language_model, self.max_target_length = features, language_model, max_target_length
        self.cut_targets: set[str] = set()
        self._targets: dict[str, list[int]] = {}

    def make(self, examples: Sequence[Example], texts: Sequence[str]) -> Batch:
        """One row per example with ``texts`` as targets, padded to the longest."""
        rows = [torch.tensor(self._target(text)) for text in texts]
        targets_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return Batch(self.features.of(examples), targets_BT)

    def target_length(self, text: str) -> int:
        """Tokens of a target, EOS included."""
        return len(self._target(text))

    def decode(self, ids_BT: Tensor) -> list[str]:
        """Generated ids → texts without special tokens."""
        texts: list[Any] = self.language_model.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _target(self, text: str) -> list[int]:
        if text not in self._targets:
            ids = self.language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > self.max_target_length:
                self.cut_targets.add(text)
            self._targets[text] = [*ids[: self.max_target_length], self.language_model.eos_id]
        return self._targets[text]
