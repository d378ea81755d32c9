"""What a run folder needs no more: trials that the plan does not name, checkpoints of finished trials."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.core.record import Run, record_path

PRUNED = "pruned"  # the folder of what was set aside, in the run folder; nothing reads it


@dataclass(frozen=True)
class Leftover:
    """A folder that a run needs no more.

    Attributes:
        path: the folder.
        why: what it is.
        kept: whether it is set aside, because it holds a result, or deleted.
    """

    path: Path
    why: str
    kept: bool

    @property
    def size_bytes(self) -> int:
        """Of its files."""
        return sum(path.lstat().st_size for path in self.path.rglob("*") if not path.is_dir())


def leftovers(run: Run) -> list[Leftover]:
    """What a run folder needs no more; nothing is changed.

    Args:
        run: as read.
    """
    return [*_foreign(run), *_checkpoints(run)]


def _foreign(run: Run) -> Iterator[Leftover]:
    planned = {trial.trial_id for trial in run.plan.trials}
    reasons = dict(zip(run.foreign, run.foreign_reasons or [""] * len(run.foreign), strict=True))
    folder = run.folder / "trials"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink() and path.name not in planned:
            what = "a record" if record_path(run.folder, path.name).exists() else "an unfinished trial"
            why = f": {reasons[path.name]}" if reasons.get(path.name) else ""
            yield Leftover(path, f"{what} that the plan does not name{why}", kept=True)


def _checkpoints(run: Run) -> Iterator[Leftover]:
    for trial_id, record in run.records.items():
        path = run.trial_folder(trial_id) / "checkpoint"
        if record.status == "finished" and path.is_dir() and not path.is_symlink():
            yield Leftover(path, "the checkpoint of a finished trial", kept=False)


def remove(run: Path, found: Leftover) -> None:
    """Set a trial aside in ``pruned/``, or delete a checkpoint.

    Raises:
        OSError: it cannot be moved or deleted.
    """
    if not found.kept:
        shutil.rmtree(found.path)
        return
    aside = run / PRUNED
    aside.mkdir(exist_ok=True)
    number, name = 1, found.path.name
    while (place := aside / (name if number == 1 else f"{name}@{number}")).exists():
        number += 1
    found.path.rename(place)
