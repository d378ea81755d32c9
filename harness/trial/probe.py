"""Measures what a trial will take: a few training steps, and one batch each of scoring and of generation.

Runs in a process of its own: see profile_process.py.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from harness.core.probed import Probed
from harness.core.record import Memory
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.build import TrialData
from harness.model.components import method_of
from harness.trial.evaluate import Evaluator
from harness.trial.measure import device_name
from harness.trial.profile import Lane
from tasks.base import Example

STEPS = 20  # measured optimizer steps of every stage, after the warm-up
_FILES = 16  # examples whose files are encoded


def probe(spec: TrialSpec, resources: Resources, data: TrialData | None = None) -> Probed:
    """Measure a trial, alone on the device.

    Args:
        spec: of the trial.
        resources: for threads and ZeRO stage.
        data: of a trial that differs at most in its adapter and learning rate; None: it is read.
    """
    stages = len(method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs))
    steps: list[list[float]] = []
    build_s = file_s = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for stage in range(stages):
            began = time.perf_counter()
            lane = Lane(spec, stage, resources, Path(folder), data)
            build_s += time.perf_counter() - began
            data = lane.data
            if stage == 0:  # a later one has what was encoded for it
                file_s = _encoding(lane)
            lane.warm_up()
            memory = _memory(lane)
            steps.append([lane.share * lane.block(number, 1).seconds for number in range(STEPS)])
            if stage == stages - 1:
                reference_s, text_s = _evaluation(lane, spec)
            device = lane.trial.device
            lane.close()
    return Probed(
        device=device_name(device),
        step_s=tuple(map(sum, zip(*steps, strict=True))),
        reference_s=reference_s,
        text_s=text_s,
        file_s=file_s,
        build_s=build_s,
        memory=memory,
    )


def _memory(lane: Lane) -> Memory:
    trial = lane.trial
    return trial.stages.engine.memory(trial.state.activations_bytes, trial.peak)


def _encoding(lane: Lane) -> float:
    """Seconds of encoding one file; 0 where there are none."""
    built = lane.trial.stages.built
    first, others = built.splits.validation[:1], built.splits.validation[1 : 1 + _FILES]
    built.batches.features.of(first)  # loads what any first call loads
    files = sum(len(example.files) for example in others)
    return _timed(lambda: built.batches.features.of(others), lane.trial.device) / files if files else 0.0


def _evaluation(lane: Lane, spec: TrialSpec) -> tuple[float, float]:
    """Seconds of scoring one reference and of generating one text, in a batch of each."""
    built, size = lane.trial.stages.built, spec.eval.per_device_eval_batch_size
    evaluator = Evaluator(built.model.eval(), built.batches, spec.eval, lane.trial.device)
    scored, written = _some(built.splits.validation, size), _some(built.splits.test, size)
    evaluator.likelihood(scored[:1])
    references = sum(len(example.references) for example in scored)
    reference_s = _timed(lambda: evaluator.likelihood(scored), lane.trial.device) / references
    return reference_s, _timed(lambda: evaluator.generate(written), lane.trial.device) / len(written)


def _some(examples: Sequence[Example], most: int) -> Sequence[Example]:
    return examples[: max(1, min(most, len(examples)))]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
