"""An adapted model in ``transformers.Trainer``, with its defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import harness
from tests.support.models import tiny_llama


class Rows(Dataset[dict[str, Tensor]]):
    """Eight rows of two contexts."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = torch.randint(3, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids_T, "labels": ids_T, "context_ids": torch.tensor([0] * 4 + [1] * 4)}


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["defaults", "checkpointing"])
def test_it_trains_the_adapters_and_nothing_else(tmp_path: Path, options: dict[str, Any]) -> None:
    adapted = harness.adapt(tiny_llama(), {"method": "lora", "rank": 2}, grouping="specific")
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", **options,
    )  # fmt: skip
    result = Trainer(model=adapted, args=arguments, train_dataset=Rows()).train()
    assert result.training_loss > 0
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("adapters.") for name in changed)
