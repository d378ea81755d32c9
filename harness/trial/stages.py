"""The model of a trial and the engine that trains it, stage by stage. Most methods have one stage, LLaVA has two."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.base import Stage
from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.model.build import build
from harness.model.components import method_of
from harness.trial.engine import Engine, load_weights


def stage_ends(stages: Sequence[Stage], batches: int, accumulation: int) -> list[int]:
    """After how many of the trial's optimizer steps each stage ends; the last end is that of the trial.

    Accumulation runs on over the end of an epoch; what is left over at the very end is not applied. A step that goes
    over the end of a stage belongs to the stage it began in. So there are as many steps as without stages.

    Args:
        stages: in their order.
        batches: of one epoch.
        accumulation: batches to an optimizer step.

    Raises:
        UserError: a stage would have no step.
    """
    epochs = list(itertools.accumulate(stage.epochs for stage in stages))
    total = batches * epochs[-1] // accumulation
    ends = [min(total, math.ceil(batches * n / accumulation)) for n in epochs]
    if len(set(ends)) < len(ends):
        raise UserError(
            f"budget: a trial of {total} optimizer steps is too short for {len(ends)} stages, the first of which "
            f"takes {math.ceil(batches * epochs[0] / accumulation)}"
        )
    return ends


class Stages:
    """Builds the model and trains it with one engine per stage, each with an optimizer and a schedule of its own.

    Args:
        spec: of the trial.
        device: where the model goes.
        zero_stage: of the engine.
        folder: of the trial; weights are put there between two stages.

    Raises:
        UserError: the method's stages do not fit the budget, or the model cannot be built.
    """

    def __init__(self, spec: TrialSpec, device: torch.device, zero_stage: int, folder: Path) -> None:
        self.spec, self.device, self.zero_stage, self.folder = spec, device, zero_stage, folder
        self.stages = method_of(spec.adapter).stages(spec.budget.epochs)
        self.built = build(spec, device)
        batches = math.ceil(self.built.order.draws / spec.optimizer.per_device_train_batch_size)
        self.ends = stage_ends(self.stages, batches, spec.optimizer.gradient_accumulation_steps)
        self.total_steps = self.ends[-1]
        self._open = False

    def start(self, step: int = 0) -> None:
        """Start the engine of the stage that makes this step of the trial, or that has just made it."""
        self._start(next(number for number, end in enumerate(self.ends) if step <= end))

    def _start(self, number: int) -> None:
        self.number, stage, options = number, self.stages[number], self.spec.optimizer
        self._steps_before = self.ends[number - 1] if number else 0
        # As built, the model says what is trained in any stage: that is what is kept, and what counts as trainable.
        model = self.built.model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            p.requires_grad_(stage.trains_language_model or name.startswith("projectors."))
        if stage.learning_rate is not None:
            options = options.model_copy(update={"learning_rate": stage.learning_rate})
        steps = self.ends[number] - self._steps_before
        units = model.adapters.changes()
        self.engine = Engine(model, options, steps, self.zero_stage, keeps=trained, units=units)
        self._open = True

    @property
    def step(self) -> int:
        """Optimizer steps of the trial so far."""
        return self._steps_before + self.engine.steps

    @property
    def over(self) -> bool:
        """Whether the stage has made its steps and another one follows."""
        return self.step == self.ends[self.number] < self.total_steps

    def advance(self) -> None:
        """Start the next stage with the weights as they are, in a model built anew: ZeRO-3 gives none back whole."""
        path, batches = self.folder / "stage.safetensors", self.built.batches
        self.engine.save_weights(path)
        self.close()
        kept = batches.features, batches.cut_targets, batches.cut_inputs
        del self.engine, self.built, batches
        gc.collect()  # DeepSpeed's engine refers to itself: without this two models would stand in memory
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # building seeds it
            self.built = build(self.spec, self.device)
        batches = self.built.batches
        batches.features, batches.cut_targets, batches.cut_inputs = kept
        load_weights(path, {name: p for name, p in self.built.model.named_parameters() if p.requires_grad})
        path.unlink()
        self._start(self.number + 1)

    def close(self) -> None:
        """Free what the engine holds, once."""
        if self._open:
            self.engine.close()
        self._open = False
