"""Checks for ``harness plan`` that there are enough examples, where this needs no download and draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.check.returned import check_examples, check_files, check_same
from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.experiment.shared import distinct
from harness.model.build import Splits as Chosen
from harness.model.build import choose_from
from harness.model.components import make_task
from tasks.base import Example, Split, Task
from tasks.captioning import CocoCaptions
from tasks.drawing.task import DrawnTask
from tasks.formats.hub_datasets import written_to
from tasks.mixture import Mixture
from tasks.splits import SPLITS

Splits = Mapping[Split, Sequence[Example]]


class UnreadableError(Exception):
    """The splits of a task cannot be read now; the message is the reason."""


class PlannedData:
    """The examples of a plan's tasks, as far as they are on this machine; every task is read once."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Task, Splits] | str] = {}
        self._chosen: dict[str, Chosen] = {}

    def task_of(self, spec: TrialSpec) -> tuple[Task, Splits]:
        """The task of a trial, and its splits.

        Raises:
            UnreadableError: they cannot be read now.
            UserError: they are of another kind, a plugin's change from read to read, or lack files.
        """
        key = spec.task.model_dump_json()
        if key not in self._tasks:
            task = make_task(spec)
            try:
                splits = readable_splits(task, spec.task.name)
                self._tasks[key] = task, splits
                if spec.task.plugin.target.partition(".")[0] != "tasks" and are_drawn(task):  # ours check as they read
                    _check_again(task, spec.task.name, splits)
            except UnreadableError as error:
                self._tasks[key] = f"task {spec.task.name}: {error}"
        found = self._tasks[key]
        if isinstance(found, str):
            raise UnreadableError(found)
        return found

    def of(self, spec: TrialSpec) -> tuple[Chosen, bool]:
        """The examples of a trial, and whether they have their content.

        Raises:
            UnreadableError: they cannot be read now.
            UserError: there are fewer than it asks for.
        """
        task, splits = self.task_of(spec)
        key = spec.model_dump_json(include={"task", "budget", "eval", "seed"})
        if key not in self._chosen:
            self._chosen[key] = choose_from(spec, task, splits)
        return self._chosen[key], are_drawn(task)


def check_counts(specs: Sequence[TrialSpec], data: PlannedData) -> list[str]:
    """Check that every split has the examples that the trials ask for.

    Args:
        specs: of the trials.
        data: of their tasks.

    Returns:
        For each task that could not be checked, its name and the reason.

    Raises:
        UserError: a split has fewer, as in ``choose_splits``.
    """
    unchecked: dict[str, None] = {}
    for spec in distinct(specs, "task", "budget", "eval"):  # the seed chooses which examples, not how many
        try:
            data.of(spec)
        except UnreadableError as error:
            unchecked[str(error)] = None
    return list(unchecked)


def readable_splits(task: Task, name: str) -> Splits:
    """The examples of each split, or as many others where they would have to be drawn first.

    Args:
        task: whose.
        name: of the task.

    Raises:
        UnreadableError: the data of a task is not here.
        UserError: what a task returned is wrong, as in ``check_examples``.
    """
    if not isinstance(task, Mixture):
        splits: Splits = {split: _examples(task, split) for split in SPLITS}
        check_examples(splits, name)
        return splits
    return {
        split: [
            replace(example, id=f"{member}/{example.id}", member=member)
            for member, own in task.members().items()
            for example in _examples(own, split)
        ]
        for split in SPLITS
    }


def _check_again(task: Task, name: str, splits: Splits) -> None:
    """What ``harness run`` refuses later: files that are not there, and a split that changes from read to read.

    Raises:
        UserError: the data of a plugin's task are so.
    """
    for split, examples in splits.items():
        check_same(examples, task.examples(split), name, split)
    check_files(splits, name)


def are_drawn(task: Task) -> bool:
    """Whether the examples are here with their content, not just their number."""
    own = task.members().values() if isinstance(task, Mixture) else [task]
    return all(one.folder.is_dir() for one in own if isinstance(one, DrawnTask))


def _examples(task: Task, split: Split) -> Sequence[Example]:
    if isinstance(task, DrawnTask) and not task.folder.is_dir():
        # Which examples are chosen depends on their ids, but how many of each task does not.
        return [Example(f"{split} {number}", (), ("",)) for number in range(getattr(task.config, f"{split}_examples"))]
    source = task.config.dataset if isinstance(task, CocoCaptions) else None
    try:
        if source is not None and not written_to(source).is_dir():
            raise UnreadableError("its data may have to be downloaded; once it is in the cache, it is counted")
        return task.examples(split)
    except UnreadableError:
        raise
    except (UserError, OSError) as error:
        raise UnreadableError(str(error)) from error
    except Exception as error:  # of a plugin whose data is not prepared
        raise UnreadableError(f"its examples cannot be read before they are prepared: {error!r}") from error
