"""What would make a trial fit on a device: each checked by the arithmetic that says it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.core.errors import UserError
from harness.core.forecast import GIB, MemoryForecast
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.quantisation import PACKED

Needs = Callable[[TrialSpec, Resources], MemoryForecast]
_WORKERS = (2, 4, 8)
_PARTITIONED = 3  # the ZeRO stage that spreads weights over the workers


def remedies(spec: TrialSpec, resources: Resources, device_bytes: int, needs: Needs) -> tuple[str, ...]:
    """Changes of an experiment with which a trial fits; first those that leave its results as they are.

    Args:
        spec: of the trial.
        resources: that it has.
        device_bytes: memory of a device.
        needs: the memory of a changed trial.
    """
    found = []
    for kind in (_recomputed, _offloaded, _spread, _smaller, _bf16, _quantised):
        for text, changed, other in kind(spec, resources):
            if other.zero_stage == _PARTITIONED and changed.backbone.quantization in PACKED:
                continue  # packed weights stay whole
            try:
                memory = needs(changed, other)
            except UserError:  # the method trains or reads the weights, or the libraries are missing
                if changed.backbone == spec.backbone:
                    raise
                continue
            if memory.device_bytes <= device_bytes:
                found.append(f"{text} ({memory.device_bytes / GIB:.3g} GiB)")
                break
    return tuple(found)


def _recomputed(spec: TrialSpec, resources: Resources) -> Iterator[tuple[str, TrialSpec, Resources]]:
    if not resources.gradient_checkpointing:
        yield (
            "resources: {gradient_checkpointing: true}",
            spec,
            resources.model_copy(update={"gradient_checkpointing": True}),
        )


def _offloaded(spec: TrialSpec, resources: Resources) -> Iterator[tuple[str, TrialSpec, Resources]]:
    if resources.offload == "none":
        stage = resources.zero_stage or 1
        yield (
            f"resources: {{zero_stage: {stage}, offload: optimizer}}",
            spec,
            resources.model_copy(update={"zero_stage": stage, "offload": "optimizer"}),
        )
    yield (
        "resources: {zero_stage: 3, offload: parameters}",
        spec,
        resources.model_copy(update={"zero_stage": 3, "offload": "parameters"}),
    )


def _spread(spec: TrialSpec, resources: Resources) -> Iterator[tuple[str, TrialSpec, Resources]]:
    """More workers, each with a part of every batch; the higher the stage, the more is spread too."""
    for workers in _WORKERS:
        if resources.workers < workers <= spec.optimizer.per_device_train_batch_size:
            for stage in range(resources.zero_stage, 4):
                yield (
                    f"resources: {{workers: {workers}, zero_stage: {stage}}}",
                    spec,
                    resources.model_copy(update={"workers": workers, "zero_stage": stage}),
                )


def _smaller(spec: TrialSpec, resources: Resources) -> Iterator[tuple[str, TrialSpec, Resources]]:
    """Smaller batches, accumulated to the same number of examples a step."""
    options = spec.optimizer
    size, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        yield (
            f"optimizer: {{per_device_train_batch_size: {size}, gradient_accumulation_steps: {accumulation}}}",
            spec.model_copy(update={"optimizer": options.model_copy(update=changed)}),
            resources,
        )


def _bf16(spec: TrialSpec, resources: Resources) -> Iterator[tuple[str, TrialSpec, Resources]]:
    if not spec.optimizer.bf16:
        options = spec.optimizer.model_copy(update={"bf16": True})
        yield "optimizer: {bf16: true}", spec.model_copy(update={"optimizer": options}), resources


def _quantised(spec: TrialSpec, resources: Resources) -> Iterator[tuple[str, TrialSpec, Resources]]:
    """The frozen language model in fewer bits: first the form that is nearer to its weights."""
    if spec.backbone.quantization is None:
        for form in reversed(PACKED):
            backbone = spec.backbone.model_copy(update={"quantization": form})
            yield f"backbone: {{quantization: {form}}}", spec.model_copy(update={"backbone": backbone}), resources
