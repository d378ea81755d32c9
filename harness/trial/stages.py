"""Builds a trial's model and trains it in stages, with one engine each. Most methods have one stage, LLaVA has two."""

from __future__ import annotations

import gc
import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from adapters.base import Stage
from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.build import Common, TrialData, build
from harness.model.compiled import Compiled, blocks_of
from harness.model.components import method_of
from harness.model.kept import Kept
from harness.model.on_disk import disk_of
from harness.model.sharing import why_not_shared
from harness.model.workers import joined
from harness.trial.engine import Engine, load_weights

logger = logging.getLogger(__name__)


def stage_ends(stages: Sequence[Stage], batches: int, accumulation: int) -> list[int]:
    """The number of the trial's optimizer steps after which each stage ends; the last one is that of the whole trial.

    Gradient accumulation continues across epochs; an incomplete accumulation at the end of the trial is not applied. A
    step that crosses the end of a stage belongs to the stage in which it began, so the total number of steps does not
    depend on the stages.

    Args:
        stages: in order.
        batches: number of batches per epoch.
        accumulation: batches per optimizer step.

    Raises:
        UserError: a stage would have no steps.
    """
    epochs = list(itertools.accumulate(stage.epochs for stage in stages))
    total = batches * epochs[-1] // accumulation
    ends = [min(total, math.ceil(batches * n / accumulation)) for n in epochs]
    if len(set(ends)) < len(ends):
        raise UserError(
            f"budget: {total} optimizer steps are too few for {len(ends)} stages, the first of which "
            f"takes {math.ceil(batches * epochs[0] / accumulation)}"
        )
    return ends


class Stages:
    """The model of a trial, and the engine of its current stage; each stage has its own optimizer and schedule.

    Args:
        spec: of the trial.
        device: of the model.
        resources: for the engine's ZeRO stage, and what it offloads.
        folder: of the trial; weights are stored there between two stages.
        data: of a trial that differs at most in its adapter and learning rate; None: it is read.
        kept: what earlier trials of this process have left.
        common: what the trial has together with others of this process; None: it has none.

    Attributes:
        shares_rows: whether training items whose inputs begin alike share a row.
        compiled: the compiled blocks of the language model; None: they compute as they are.

    Raises:
        UserError: the method's stages do not fit the budget, or the model cannot be built.
    """

    def __init__(
        self,
        spec: TrialSpec,
        device: torch.device,
        resources: Resources,
        folder: Path,
        data: TrialData | None = None,
        kept: Kept | None = None,
        common: Common | None = None,
    ) -> None:
        self.spec, self.device, self.resources, self.folder, self._kept = spec, device, resources, folder, kept
        self.stages = method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs)
        self.built = build(spec, device, data, kept, common, resources, disk_of(resources, folder.parents[1]))
        batches = math.ceil(self.built.order.draws / spec.optimizer.per_device_train_batch_size)
        self.ends = stage_ends(self.stages, batches, spec.optimizer.gradient_accumulation_steps)
        self.total_steps = self.ends[-1]
        self.shares_rows = resources.shared_prefix and self._can_share()
        self._open = False
        self.compiled: Compiled | None = None

    def _can_share(self) -> bool:
        if not self.built.order.repeats_inputs:
            return False
        reason = why_not_shared(self.built.model, self.built.batches)
        if reason is not None:
            logger.info("training items get rows of their own: %s", reason)
        return reason is None

    def stops_after(self, epochs: int, best: int | None) -> bool:
        """Whether training stops before its last epoch, because ``budget.patience`` is over.

        Args:
            epochs: that have been trained.
            best: the epoch that validated best.
        """
        patience = self.spec.budget.patience
        if patience is None or best is None:
            return False
        before_last_stage = sum(stage.epochs for stage in self.stages[:-1])
        return epochs - max(best, before_last_stage) >= patience

    def start(self, step: int = 0) -> None:
        """Create the engine of the stage that contains this optimizer step of the trial, or that ends with it."""
        self._start(next(number for number, end in enumerate(self.ends) if step <= end))

    def _start(self, number: int) -> None:
        self.number, stage, options = number, self.stages[number], self.spec.optimizer
        self._steps_before = self.ends[number - 1] if number else 0
        self.built.model.chunked_loss = self.resources.chunked_loss
        # In the model as built, parameters that any stage trains require gradients: these are kept and saved.
        model = self.built.model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            p.requires_grad_(stage.trains_language_model or name.startswith("projectors."))
        if stage.learning_rate is not None:
            options = options.model_copy(update={"learning_rate": stage.learning_rate})
        steps = self.ends[number] - self._steps_before
        units = model.adapters.changes()
        zero_stage, offload = self.resources.zero_stage, self.resources.offload
        fused = self.resources.fused_step
        model.adapters.compute_together(fused)
        self.compiled = (
            Compiled(blocks_of(model.language_model, adapted=True)) if self.resources.torch_compile else None
        )
        self.engine = Engine(
            model, options, steps, zero_stage, keeps=trained, units=units, offload=offload, fused=fused
        )
        self._open = True

    def compiling_s(self) -> float:
        """Seconds that compiling has taken since this was asked last."""
        return self.compiled.new_s() if self.compiled else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """That the current stage is not compiled, though it was asked for."""
        plain = self.compiled.why_plain if self.compiled else None
        return (f"resources.torch_compile: not compiled: {plain}",) if plain else ()

    @property
    def starts(self) -> list[int]:
        """For each stage, an optimizer step of the trial with which ``start`` begins it."""
        return [0, *(end + 1 for end in self.ends[:-1])]

    @property
    def step(self) -> int:
        """Number of optimizer steps of the trial so far."""
        return self._steps_before + self.engine.steps

    @property
    def stage_ended(self) -> bool:
        """Whether the current stage has taken all its steps and another one follows."""
        return self.step == self.ends[self.number] < self.total_steps

    def advance(self) -> None:
        """Start the next stage with the current weights, in a rebuilt model: ZeRO-3 leaves parameters partitioned."""
        path, batches = self.folder / "stage.safetensors", self.built.batches
        self.engine.save_weights(path)
        self.close()
        data, cut = self.built.data, (batches.cut_targets, batches.cut_inputs)
        del self.engine, self.built, batches
        gc.collect()  # DeepSpeed's engine has reference cycles: without this, two models would be in memory
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # building the model seeds the generator
            self.built = build(self.spec, self.device, data, self._kept, resources=self.resources)
        self.built.batches.cut_targets, self.built.batches.cut_inputs = cut
        load_weights(path, {name: p for name, p in self.built.model.named_parameters() if p.requires_grad})
        joined().wait()
        path.unlink(missing_ok=True)
        self._start(self.number + 1)

    def close(self) -> None:
        """Free the engine's memory; further calls have no effect."""
        if self._open:
            self.engine.close()
            if self.compiled is not None:
                self.compiled.close()
        self._open = False
