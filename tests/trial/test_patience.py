"""Training stops when validation has not improved for ``budget.patience`` epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.base import Stage
from harness.core.record import Epoch
from harness.experiment.sections import Budget, Resources
from harness.trial.stages import Stages
from harness.trial.steps import Steps
from harness.trial.trial import Trial
from tests.support.trials import LORA, Recorder, run, spec_of


def epochs_trained(folder: Path, perplexities: list[float], patience: int, stages: tuple[int, ...] = (6,)) -> int:
    """How many epochs a trial trains whose validation gives these perplexities."""
    spec = spec_of(folder, budget={"examples": 8, "epochs": 6, "patience": patience})
    trial = Trial(spec, folder, Resources(), Recorder(), print)
    trial.stages = Stages.__new__(Stages)  # without a model
    trial.stages.spec, trial.stages.stages = spec, [Stage(count, True) for count in stages]

    def epoch(number: int) -> Steps[None]:
        value = perplexities[number - 1]
        if value < min((e.validation_perplexity for e in trial.state.history), default=9e9):
            trial.state.best_epoch = number
        trial.state.history.append(
            Epoch(epoch=number, step=number, train_loss=1, validation_perplexity=value, learning_rate=1e-3)
        )
        yield from ()

    trial._epoch = epoch  # type: ignore[assignment, method-assign]
    assert list(trial._train()) == []
    return len(trial.state.history)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("perplexities", "patience", "trained"),
    [
        ([5, 4, 3, 2, 1, 0.5], 1, 6),
        ([5, 6, 4, 4, 3, 2], 1, 2),
        ([5, 6, 4, 4, 3, 2], 2, 6),
        ([5, 4, 4, 4, 3, 2], 2, 4),
    ],
)
def test_it_stops_after_so_many_epochs_without_a_better_one(
    tmp_path: Path, perplexities: list[float], patience: int, trained: int
) -> None:
    assert epochs_trained(tmp_path, perplexities, patience) == trained


def test_a_recipe_of_several_stages_is_not_stopped_before_its_last_one(tmp_path: Path) -> None:
    assert epochs_trained(tmp_path, [1, 2, 3, 4, 5, 6], 1, stages=(3, 3)) == 4


def test_a_trial_that_stops_early_is_tested_and_finished(tmp_path: Path) -> None:
    """With so small a learning rate no weight changes, and no epoch is better than the first."""
    budget: dict[str, Any] = {"examples": 8, "epochs": 5, "patience": 1}
    spec = spec_of(tmp_path, {**LORA, "learning_rate": 1e-30}, budget=budget)
    record = run(spec, tmp_path)
    assert (record.status, len(record.history), record.best_epoch) == ("finished", 2, 1)
    assert record.data is not None
    assert record.data.steps == 2
    assert record.spec["budget"]["patience"] == 1


@pytest.mark.quick
def test_without_patience_a_budget_is_stored_as_before_there_was_one() -> None:
    assert "patience" not in Budget().model_dump()
    assert "patience" not in Budget().model_dump_json()
    assert Budget.model_validate_json(Budget(patience=3).model_dump_json()).patience == 3
