"""Data that changed under their name since trials finished: a trial's id has the options of its task, not its files.

Trials of both are never compared (``results/leaderboard/matched.py``); here ``harness run`` sees and says it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.record import TrialRecord
from harness.sweep.input_files import lines_of, named_paths

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec


def state_of_data(specs: Sequence[TrialSpec], runs: Path) -> Iterator[str]:
    """Path, size and time of change of every file that an option of a task names, or that is in a folder that it names.

    Args:
        specs: of the trials.
        runs: the parent of the run folder, which is no data.
    """
    for path, key in named_paths(specs).items():
        if key.startswith("task."):
            yield from lines_of(path, runs)


def changes(specs: Iterable[TrialSpec], records: Mapping[str, TrialRecord], run: Path) -> list[str]:
    """What to say of data that are no longer those of finished trials; one line for each task.

    Args:
        specs: of the trials; their data can be read.
        records: of the run, by trial id.
        run: the run folder.
    """
    from harness.model.budget import content_fingerprint
    from harness.model.build import choose_splits
    from harness.model.components import make_task
    from harness.model.inputs import Inputs

    first: dict[Any, tuple[TrialSpec, TrialRecord]] = {}
    counts: dict[Any, int] = {}
    for spec in specs:
        record = records.get(spec.trial_id)
        if record is not None and record.status == "finished" and record.data is not None:
            key = spec.task.model_dump_json()
            first.setdefault(key, (spec, record))
            counts[key] = counts.get(key, 0) + 1
    lines, digest = [], Inputs(run).digest
    for key, (spec, record) in first.items():
        splits = choose_splits(spec, make_task(spec))
        now = {
            "training examples": content_fingerprint(splits.train, digest),
            "evaluation examples": content_fingerprint([*splits.validation, *splits.test], digest),
        }
        assert record.data is not None  # noqa: S101 - for the type checker
        then = (record.data.examples_fingerprint, record.data.evaluation_fingerprint)
        differing = [what for (what, found), before in zip(now.items(), then, strict=True) if found != before]
        if differing:
            lines.append(
                f"task {spec.task.name}: the data have changed under their name since trials finished "
                f"({counts[key]} of this run): {' and '.join(differing)} differ. Trials of both are not compared; "
                "start again with --fresh, or restore the data"
            )
    return lines
