"""Whether a run has anything left to do: it has not if a run has done all there was, and nothing has changed since.

Then ``harness run`` neither checks data and models nor writes the report again, which takes minutes for ten thousand
trials. Whatever the report is made of is compared by size and time of change: plan, records, scores of examples, the
report itself, and the code that writes it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from harness.core.files import write_atomically
from harness.core.forecast import FILE_NAME as FORECAST
from harness.core.profile import FILE_NAME as PROFILE
from harness.core.samples import PREVIEWS
from harness.core.schema import Schema, read_strictly
from harness.core.search import DECISIONS
from harness.tracking.journal import JOURNAL

FILE_NAME = "settled.json"  # in the run folder
_ROOT = Path(__file__).parents[2]
_CODE = ("harness", "adapters", "tasks", "results")
_LIBRARIES = ("numpy", "pandas", "scipy", "matplotlib")  # that the numbers and pictures of a report come from
_RUN_FILES = {"plan.json", "experiment.yaml", PROFILE, FORECAST, DECISIONS}
_TRIAL_FILES = {"record.json", "paused.json", "examples.parquet", "attention.safetensors", JOURNAL}


class Settled(Schema):
    """``settled.json``.

    Attributes:
        state: what the run folder and the code were when nothing was left to do.
        tracking_link: of the grid on MLflow's page.
    """

    state: str
    tracking_link: str | None


def read_settled(run: Path, said: Iterable[str]) -> Settled | None:
    """What a run that had nothing left to do has written; None if there is none, or something has changed since.

    Args:
        run: the run folder.
        said: what was asked for: plan, experiment, places, options.
    """
    try:
        found = read_strictly(Settled, run / FILE_NAME, "the state of a run")
    except (OSError, ValueError):
        return None
    return found if found.state == _state(run, said) else None


def settle(run: Path, said: Iterable[str], tracking_link: str | None) -> None:
    """Write that nothing is left to do; the last thing that a run writes."""
    content = Settled(state=_state(run, said), tracking_link=tracking_link)
    write_atomically(run / FILE_NAME, content.model_dump_json(indent=1) + "\n")


def _state(run: Path, said: Iterable[str]) -> str:
    run = run.resolve()
    digest = hashlib.sha256()
    code = (line for folder in _CODE for line in _files(_ROOT / folder))
    libraries = (f"{name} {version(name)}" for name in _LIBRARIES)
    for line in (*said, *libraries, *sorted(code), *sorted(_of_run(run))):
        digest.update(f"{len(line)} {line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _of_run(run: Path) -> Iterator[str]:
    yield from (_line(entry) for entry in os.scandir(run) if entry.name in _RUN_FILES)
    for name in ("report", PREVIEWS):
        yield from _files(run / name)
    for folder in os.scandir(run / "trials"):
        if folder.is_dir(follow_symlinks=False):
            yield from (_line(entry) for entry in os.scandir(folder) if entry.name in _TRIAL_FILES)
        else:
            yield _line(folder)


def _files(folder: Path) -> Iterator[str]:
    """Of all files below a folder, without compiled code."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if entry.name != "__pycache__":
                yield from _files(Path(entry.path))
        else:
            yield _line(entry)


def _line(entry: os.DirEntry[str]) -> str:
    status = entry.stat(follow_symlinks=False)
    return f"{entry.path} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
