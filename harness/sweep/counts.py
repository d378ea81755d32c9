"""Checks for ``harness plan`` that there are enough examples, where this needs no download and draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.model.budget import choose
from harness.model.build import choose_splits
from harness.model.components import make_task
from tasks.base import Example, Task
from tasks.drawing.task import DrawnTask
from tasks.splits import SPLITS, FileTask


def check_counts(specs: Sequence[TrialSpec]) -> list[str]:
    """Check that every split has the examples that the trials ask for.

    Returns:
        For each task that could not be checked, its name and the reason.

    Raises:
        UserError: a split has fewer, as in ``choose_splits``.
    """
    unchecked: dict[str, str] = {}
    tasks: dict[str, Task] = {}
    for spec in {spec.model_dump_json(include={"task", "budget", "eval", "seed"}): spec for spec in specs}.values():
        key = spec.task.model_dump_json()
        if key not in tasks:
            tasks[key] = make_task(spec)
            if reason := _unreadable(tasks[key]):
                unchecked[key] = f"task {spec.task.name}: {reason}"
        if key not in unchecked:
            choose_splits(spec, tasks[key])
        elif isinstance(tasks[key], DrawnTask):
            _check_drawn(spec, tasks[key].config)
    return [why for key, why in unchecked.items() if not isinstance(tasks[key], DrawnTask)]


def _unreadable(task: Task) -> str | None:
    """The reason why the splits cannot be read now; None: they can. Nothing is downloaded or written."""
    for member in task.members().values():
        if isinstance(member, DrawnTask):
            if not member.folder.is_dir():
                return "its data is not drawn yet"
        elif not isinstance(member, FileTask) or getattr(member.config, "dataset", None) is not None:
            return "its data may have to be downloaded"
    try:
        for split in SPLITS:
            task.examples(split)
    except (UserError, OSError) as error:
        return str(error)
    return None


def _check_drawn(spec: TrialSpec, config: Any) -> None:
    """Check the counts of a task whose data is not drawn yet, from its options."""
    asked = (spec.budget.examples, spec.eval.validation_examples, spec.eval.test_examples)
    keys = ("budget.examples", "eval.validation_examples", "eval.test_examples")
    for split, key, count in zip(SPLITS, keys, asked, strict=True):
        drawn = [Example(str(number), (), ("",)) for number in range(getattr(config, f"{split}_examples"))]
        choose(drawn, count, 0, f"{key}: task {spec.task.name}")
