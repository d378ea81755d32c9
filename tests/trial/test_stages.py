"""Trials in several stages: the same budget as other methods, the right weights tested, resumed in the right stage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adapters.registry import ADAPTERS
from harness.core.record import TrialRecord
from harness.trial import stages, trial
from harness.trial.engine import Engine
from harness.trial.trial import Progress
from tests.support.trials import FULL, LORA, examples_of, run, spec_of

LLAVA = {"method": "llava", "learning_rate": 3e-3, "projector_learning_rate": 1e-2}
SCHEDULE = {"per_device_train_batch_size": 8, "lr_scheduler_type": "linear", "warmup_ratio": 0.25}
GROUPED = [name for name, entry in ADAPTERS.entries().items() if ADAPTERS.load(entry.target).grouped]


class Killed(BaseException):
    """Stands for SIGKILL: no error handler catches it."""


def killed_in_epoch(number: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.phase == "train" and progress.epoch == number:
            raise Killed(f"killed in epoch {number}")

    return report


def weights_of(folder: Path, record: TrialRecord) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "trials" / record.trial_id / "best.safetensors")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialRecord, Path]:
    """Epoch 1 trains the projector, epochs 2 and 3 the language model too; four steps each."""
    folder = tmp_path_factory.mktemp("llava")
    models: list[weakref.ref[Any]] = []
    build = stages.build

    def counting(*args: Any, **options: Any) -> Any:
        assert [model() for model in models] == [None] * len(models), "there are never two models in memory"
        built = build(*args, **options)
        models.append(weakref.ref(built.model))
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "build", counting)
        record = run(spec_of(folder, LLAVA, optimizer=SCHEDULE), folder)
    assert record.status == "finished", record.reason
    assert len(models) == 2
    return record, folder


def test_data_and_steps_are_those_of_other_methods(llava: Any, tmp_path: Path) -> None:
    record, _ = llava
    other = run(spec_of(tmp_path, LORA, optimizer=SCHEDULE), tmp_path)
    assert record.data == other.data
    assert [(e.epoch, e.step) for e in record.history] == [(1, 4), (2, 8), (3, 12)] == [
        (e.epoch, e.step) for e in other.history
    ]  # fmt: skip


def test_each_stage_has_its_own_learning_rate_and_schedule(llava: Any) -> None:
    """Linear to zero at the end of each: at the end of epoch 2 the second has 4 of 6 steps after warm-up before it."""
    record, _ = llava
    assert [e.learning_rate for e in record.history] == pytest.approx([0.0, 3e-3 * 4 / 6, 0.0])


def test_what_is_counted_is_what_any_stage_trains_and_measured_in_the_last(llava: Any, tmp_path: Path) -> None:
    record, folder = llava
    full = run(spec_of(tmp_path, FULL, budget={"examples": 32, "epochs": 1}), tmp_path)
    assert record.parameters == full.parameters
    assert record.memory.gradients_bytes == full.memory.gradients_bytes == 4 * record.parameters.trainable
    assert record.memory.optimizer_bytes == full.memory.optimizer_bytes
    assert record.throughput.measured_steps == 8 - 3  # steps of the second stage, warm-up left out
    assert sum(x.numel() for x in weights_of(folder, record).values()) == record.parameters.trainable
    assert sum(record.phases_s.values()) == pytest.approx(record.wall_time_s)
    files = {path.name for path in (folder / "trials" / record.trial_id).iterdir()}
    assert files == {"record.json", "examples.parquet", "log.txt", "best.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_zero_stage_does_not_change_the_result(llava: Any, stage: int, tmp_path: Path) -> None:
    """Different summation order: 1e-3 relative after 12 steps."""
    record, _ = llava
    other = run(spec_of(tmp_path, LLAVA, optimizer=SCHEDULE), tmp_path, zero_stage=stage)
    assert other.status == "finished", other.reason
    found, expected = ([e.validation_perplexity for e in r.history] for r in (other, record))
    assert found == pytest.approx(expected, rel=1e-3)
    assert other.metrics["test"]["perplexity"] == pytest.approx(record.metrics["test"]["perplexity"], rel=1e-3)


def spoil(monkeypatch: pytest.MonkeyPatch, steps_before: int) -> None:
    """Perturb the trained weights from some step on, so that the best epoch is before it."""
    step, calls = Engine.train_step, 0

    def spoiled(engine: Engine, batch: Any) -> float:
        nonlocal calls
        calls += 1
        loss = step(engine, batch)
        if calls > steps_before:
            with torch.no_grad():
                for p in engine.model.parameters():
                    if p.requires_grad:
                        p.add_(torch.randn_like(p), alpha=0.5)
        return loss

    monkeypatch.setattr(Engine, "train_step", spoiled)


def test_the_best_epoch_may_be_in_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the language model is tested as it was before training, though a later stage has changed it."""
    base: dict[str, torch.Tensor] = {}
    build = stages.build

    def remembering(*args: Any, **options: Any) -> Any:
        built = build(*args, **options)
        base.update({name: p.detach().clone() for name, p in built.model.named_parameters()})
        return built

    monkeypatch.setattr(stages, "build", remembering)
    spoil(monkeypatch, steps_before=4)
    record = run(spec_of(tmp_path, LLAVA, budget={"examples": 32, "epochs": 2}), tmp_path)
    first, second = (e.validation_perplexity for e in record.history)
    assert second > 1.05 * first
    assert record.best_epoch == 1
    assert record.metrics["validation"]["perplexity"] == pytest.approx(first, rel=1e-6)
    weights = weights_of(tmp_path, record)
    assert set(weights) == set(base)
    changed = {name for name, x in weights.items() if not torch.equal(x, base[name])}
    assert changed == {"projectors.image.layers.1.weight", "projectors.image.layers.1.bias"}


@pytest.mark.parametrize(
    ("projector_epochs", "killed_in", "bf16", "zero_stage"),
    [
        (1, 2, False, 0),  # between the two
        pytest.param(2, 2, False, 0, marks=pytest.mark.slow),  # inside the first stage
        pytest.param(1, 3, False, 0, marks=pytest.mark.slow),  # inside the second
        pytest.param(1, 2, True, 0, marks=pytest.mark.slow),
        pytest.param(1, 3, False, 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.e2e
def test_a_killed_trial_resumes_in_its_stage(
    llava: Any, projector_epochs: int, killed_in: int, bf16: bool, zero_stage: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)  # report every step
    (tmp_path / "whole").mkdir()
    (tmp_path / "died").mkdir()
    adapter = LLAVA | {"projector_epochs": projector_epochs}
    spec = spec_of(tmp_path, adapter, optimizer=SCHEDULE | {"bf16": bf16})
    expected, _ = llava
    if spec.trial_id != expected.trial_id or zero_stage:
        expected = run(spec, tmp_path / "whole", zero_stage=zero_stage)
    assert expected.status == "finished", expected.reason
    always = {"checkpoint_interval_s": 0.0, "zero_stage": zero_stage}
    with pytest.raises(Killed, match="killed in epoch"):
        run(spec, tmp_path / "died", killed_in_epoch(killed_in), **always)
    epochs: list[int] = []
    resumed = run(spec, tmp_path / "died", lambda p: epochs.append(p.epoch) if p.phase == "train" else None, **always)
    assert set(epochs) == set(range(killed_in, 4))
    assert resumed.history == expected.history
    assert resumed.metrics == expected.metrics
    assert resumed.data == expected.data


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, LLAVA], ids=lambda a: a["method"])
def test_no_checkpoint_is_saved_between_accumulated_gradients_and_their_step(
    adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches per epoch, two per step: an odd epoch ends between, so its last checkpoint is of its first step."""
    monkeypatch.setattr(trial, "REPORT_INTERVAL_S", 0.0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "died").mkdir()
    optimizer = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    spec = spec_of(tmp_path, adapter, optimizer=optimizer, budget={"examples": 24, "epochs": 4})
    expected = run(spec, tmp_path / "whole")
    assert [e.step for e in expected.history] == [1, 3, 4, 6]
    for killed_in, last in ((2, "epoch-1-step-1"), (4, "epoch-3-step-4")):
        with pytest.raises(Killed, match="killed in epoch"):
            run(spec, tmp_path / "died", killed_in_epoch(killed_in), checkpoint_interval_s=0.0)
        epochs = [path.name for path in (tmp_path / "died").glob("trials/*/checkpoint/epoch-*")]
        assert epochs == [last]
    resumed = run(spec, tmp_path / "died", checkpoint_interval_s=0.0)
    assert resumed.history == expected.history
    assert resumed.data == expected.data


@pytest.mark.parametrize(
    ("epochs", "options", "reason"),
    [
        (
            1,
            {},
            "UserError: projector_epochs: found 1 of budget.epochs=1, which leaves no epoch for the language model",
        ),
        (2, {"gradient_accumulation_steps": 8}, "UserError: budget: 1 optimizer steps are too few"),
    ],
)
def test_a_stage_without_steps_fails_the_trial(
    epochs: int, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    optimizer = {"per_device_train_batch_size": 8, **options}
    spec = spec_of(tmp_path, LLAVA, budget={"examples": 32, "epochs": 2}, optimizer=optimizer)
    spec = spec.model_copy(update={"budget": spec.budget.model_copy(update={"epochs": epochs})})
    record = run(spec, tmp_path)
    assert record.status == "failed"
    assert (record.reason or "").startswith(reason)
    assert record.history == ()


def check_that_it_learns(name: str, folder: Path) -> None:
    adapter = {"method": name, "grouping": "specific", "learning_rate": 1e-2}
    record = run(spec_of(folder, adapter, budget={"examples": 64, "epochs": 2}), folder)
    assert record.status == "finished", record.reason
    assert record.history[1].train_loss < record.history[0].train_loss
    assert record.parameters.adapter > 0
    assert len(record.parameters.by_group) == 2
    assert examples_of(folder, record)["nll"].notna().all()


def test_a_combination_trains(tmp_path: Path) -> None:
    check_that_it_learns("lora+bitfit", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPED)
def test_every_grouped_method_trains(name: str, tmp_path: Path) -> None:
    check_that_it_learns(name, tmp_path)
