"""Memory of one worker of a trial, by kind, from a traced step: what ``Engine.memory`` will measure."""

from __future__ import annotations

import math

from harness.core.forecast import MemoryForecast
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.price.trace import Traced

_MOMENTS, _MASTER = 8, 4  # bytes of a trained parameter: AdamW's two moments; DeepSpeed's fp32 copy
_GRADIENTS, _PARAMETERS = 2, 3  # ZeRO stages from which they are spread over the workers
_STEP = 4  # bytes of AdamW's count of steps, one for each tensor that it has


def memory_of(traced: Traced, spec: TrialSpec, resources: Resources, longest: float = 1.0) -> MemoryForecast:
    """The memory of one worker.

    Args:
        traced: a step on a worker's share of the batch.
        spec: of the trial.
        resources: for its workers, ZeRO stage, and what is offloaded.
        longest: positions of the longest row over those of the traced batch.
    """
    stage, workers = resources.zero_stage, resources.workers
    weights = traced.weights_bytes
    gradients = traced.trained_bytes
    activations, working = traced.activations_bytes, traced.working_bytes
    bf16 = spec.optimizer.bf16
    # DeepSpeed trains a copy in fp32, spread over the workers, except in stage 0 and fp32; of stage 3 no record has it.
    share = math.ceil(traced.trained / workers) if stage or bf16 else traced.trained
    master = _MASTER if stage in (1, _GRADIENTS) or (stage == 0 and bf16) else 0
    optimizer = (_MOMENTS + master) * share + _STEP * (1 if stage else traced.tensors)
    if stage >= _GRADIENTS:
        gradients = math.ceil(gradients / workers)
    if stage == _PARAMETERS:
        activations, working = activations + weights, working + weights  # gathered for forward, and kept for backward
        weights = math.ceil(weights / workers)
    offloaded = {"none": 0, "optimizer": optimizer, "parameters": optimizer + weights}[resources.offload]
    return MemoryForecast(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        working_bytes=round(max(1.0, longest) * working),
        offloaded_bytes=offloaded,
    )
