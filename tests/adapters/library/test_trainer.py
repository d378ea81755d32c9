"""An adapted model in ``transformers.Trainer``, with its defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import harness
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt

DROPOUT = {"method": "lora", "rank": 2, "dropout": 0.3}
SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": (DROPOUT, "specific"),
    "vera": ({"method": "vera", "rank": 4}, "specific"),
    "soft_prompt": ({"method": "soft_prompt+ia3", "num_virtual_tokens": 2}, "specific"),
    "full": ({"method": "full"}, "agnostic"),
}


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of two contexts."""

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids_T = torch.randint(3, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids_T, "labels": ids_T, "context_ids": torch.tensor([0] * 4 + [1] * 4)}


def tied(make_model: Any = tiny_llama) -> Any:
    """A base whose embeddings are tied, as GPT-2's and OPT's always are."""
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def adapted(name: str, make_model: Any = tiny_llama) -> harness.AdaptedModel:
    spec, grouping = SPECS[name]
    return harness.adapt(tied(make_model), spec, grouping=grouping)


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(folder), learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(4))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=["defaults", "checkpointing"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_it_trains_the_adapters_and_nothing_else(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted("lora")
    before = values(model)
    result = trainer(model, tmp_path, **options).train()
    assert result.training_loss > 0
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("adapters.") for name in changed)
    assert model.is_activation_checkpointing == bool(options)


@pytest.mark.parametrize(
    ("name", "make_model"),
    [
        ("lora", tiny_llama),
        *(pytest.param(name, tiny_llama, marks=pytest.mark.slow) for name in SPECS if name != "lora"),
        pytest.param("lora", tiny_gpt2, marks=pytest.mark.slow),
        pytest.param("lora", tiny_opt, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path, name: str, make_model: Any) -> None:
    model = adapted(name, make_model)
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    whole = trainer(model, tmp_path, save_strategy="steps", save_steps=2, logging_steps=1)
    whole.train()
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", framework="pt") as file:
        kept = set(file.keys())
    frozen = {f"adapters.{key}" for key in model.adapters.state_dict()} - own.keys()
    assert kept == own.keys() | frozen  # nothing of a frozen base; of tied weights one name

    again = adapted(name, make_model)
    resumed = trainer(again, tmp_path / "resumed", logging_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(values(again), values(model))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted("lora")
    one = trainer(
        model, tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, greater_is_better=True, metric_for_best_model="loss", max_steps=3,
    )  # fmt: skip
    one.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry}
    best = max(losses, key=lambda step: losses[step])
    assert best < 3, "nothing to go back to"
    assert one.evaluate()["eval_loss"] == pytest.approx(losses[best])
    assert_equal(dict(model.state_dict()), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))


@pytest.mark.slow
def test_predictions_are_the_models_own(tmp_path: Path) -> None:
    model = adapted("lora")
    one = trainer(model, tmp_path, max_steps=1)
    one.train()
    found = one.predict(Rows(4))  # type: ignore[arg-type]
    rows = [Rows()[index] for index in range(4)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = model.eval()(**batch)
    np.testing.assert_allclose(found.predictions, expected.logits.numpy(), rtol=1e-5, atol=1e-5)
    assert found.metrics is not None
    assert found.metrics["test_loss"] == pytest.approx(float(expected.loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_the_base_in_trainer(tmp_path: Path, smoothing: float) -> None:
    """Before training: shifted labels, also when they are smoothed, and one mean over accumulated batches."""

    def first(model: Any) -> float:
        one = trainer(
            model, tmp_path, max_steps=1, logging_steps=1, gradient_accumulation_steps=2, remove_unused_columns=False,
            label_smoothing_factor=smoothing,
        )  # fmt: skip
        one.data_collator = lambda rows: {  # type: ignore[assignment]
            key: torch.stack([row[key] for row in rows]) for key in rows[0]
            if key != "context_ids" or isinstance(model, harness.AdaptedModel)
        }  # fmt: skip
        one.train()
        return float(next(entry["loss"] for entry in one.state.log_history if "loss" in entry))

    assert first(adapted("lora")) == pytest.approx(first(tied().requires_grad_(True)), rel=1e-4)


_LOAD = """
import sys, torch, harness
from safetensors.torch import load_file
from tests.adapters.library.test_trainer import Rows, adapted
model = adapted("lora")
model.load_state_dict(load_file(sys.argv[1]))
row = Rows()[0]
with torch.no_grad():
    print(float(model(row["input_ids"][None], labels=row["labels"][None], context_ids=row["context_ids"]).loss))
"""


@pytest.mark.slow
def test_a_saved_model_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    model = adapted("lora")
    one = trainer(model, tmp_path)
    one.train()
    one.save_model(str(tmp_path / "saved"))
    row = Rows()[0]
    with torch.no_grad():
        found = model.eval()(row["input_ids"][None], labels=row["labels"][None], context_ids=row["context_ids"])
    fresh = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path / "saved" / "model.safetensors")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert float(fresh.stdout.splitlines()[-1]) == pytest.approx(float(found.loss), rel=1e-6)
