"""The registries of tasks, modalities and metrics."""

from __future__ import annotations

from harness.core.registry import Registry
from tasks.base import Metric, Modality, Task

TASKS: Registry[Task] = Registry("task", "harness.tasks", lambda: Task)
MODALITIES: Registry[Modality] = Registry("modality", "harness.modalities", lambda: Modality)
METRICS: Registry[Metric] = Registry("metric", "harness.metrics", lambda: Metric)
