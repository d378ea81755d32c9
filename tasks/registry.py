"""The registries of tasks, modalities, encoders and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.core.registry import Registry
from tasks.base import Metric, Modality, Task

if TYPE_CHECKING:
    from tasks.encoder import Encoder


def _encoder() -> type[Encoder]:
    from tasks.encoder import Encoder  # it imports torch

    return Encoder


TASKS: Registry[Task] = Registry("task", "harness.tasks", lambda: Task)
MODALITIES: Registry[Modality] = Registry("modality", "harness.modalities", lambda: Modality)
METRICS: Registry[Metric] = Registry("metric", "harness.metrics", lambda: Metric)
ENCODERS: Registry[Encoder] = Registry(
    "encoder", "harness.encoders", _encoder, accepts=lambda encoder: bool(encoder.modality)
)
