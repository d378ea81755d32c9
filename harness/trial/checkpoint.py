"""Checkpoints of a trial, after an optimizer step or an epoch; each is complete or does not count.

A checkpoint is a folder with the engine's files and one file of each worker. ``state.json``, written last, names the
valid one with the sizes of its files; then the one before it is removed. So a crash leaves a complete one.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from harness.core.files import write_atomically
from harness.core.record import Epoch, Memory
from harness.model.workers import Workers
from harness.trial.engine import Engine
from harness.trial.measure import Counts

BEST = "best.safetensors"  # trained parameters of the epoch with the lowest validation perplexity
FOLDER = "checkpoint"  # in the trial's folder
_STATE = "state.json"
_EXPENSIVE = 0.05  # share of the interval that a checkpoint may take before it is told
_RANDOM, _LOSSES, _COUNTS, _CUT = "random_", "losses", "counts", "cut_"
logger = logging.getLogger(__name__)


class BrokenCheckpointError(ValueError):
    """A checkpoint cannot be used."""


class Saved(BaseModel):
    """What a checkpoint says of its trial."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tag: Annotated[str, Field(pattern=r"^epoch-\d+(-step-\d+)?$")]  # name of its folder
    layout: dict[str, int] | None = None  # over what it is spread; None: it was written before this was said
    history: tuple[Epoch, ...]
    best_epoch: int | None
    step: int
    phases_s: dict[str, float]
    activations_bytes: int
    memory: Memory | None = None  # measured until then, in the stage of the trial that it is in
    files: dict[str, int] = Field(default_factory=dict)  # size in bytes of each


@dataclass
class Place:
    """What one worker must know to go on inside an epoch.

    Attributes:
        losses: of the batches of the epoch so far.
        random: states of the random generators (CPU, then GPU), by which dropout goes on; empty: they are unknown.
        cut: kind of text → keys of the texts that were truncated.
        counts: of the steps that were measured in the stage of the trial so far.
        device: on which they were measured.
    """

    losses: list[float] = field(default_factory=list)
    random: list[Tensor] = field(default_factory=list)
    cut: dict[str, set[int]] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    device: str = ""

    def write(self, path: Path) -> None:
        """Write it as safetensors."""
        counts = self.counts
        tensors = {
            _LOSSES: torch.tensor(self.losses, dtype=torch.float64),
            _COUNTS: torch.tensor([counts.steps, counts.examples, counts.tokens, counts.seconds], dtype=torch.float64),
        }
        tensors |= {f"{_RANDOM}{number}": state.cpu() for number, state in enumerate(self.random)}
        tensors |= {f"{_CUT}{kind}": torch.tensor(sorted(keys), dtype=torch.int64) for kind, keys in self.cut.items()}
        safetensors.torch.save_file(tensors, path, {"device": self.device})

    @staticmethod
    def read(path: Path) -> Place:
        """Read what ``write`` wrote."""
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            device = (file.metadata() or {}).get("device", "")
        steps, examples, tokens, seconds = tensors[_COUNTS].tolist()
        cut = {name.removeprefix(_CUT): set(x.tolist()) for name, x in tensors.items() if name.startswith(_CUT)}
        random = [tensors[name] for name in sorted(tensors) if name.startswith(_RANDOM)]
        counts = Counts(int(steps), int(examples), int(tokens), seconds)
        return Place(tensors[_LOSSES].tolist(), random, cut, counts, device)


class Checkpoints:
    """The checkpoints of a trial, of which one is valid.

    Args:
        trial: folder of the trial.
        workers: of the trial; all call the methods together.
        layout: over what a checkpoint of these workers is spread.
        interval_s: between two.

    Attributes:
        tag: of the valid one, if this process has made or loaded it.
    """

    def __init__(self, trial: Path, workers: Workers, layout: Mapping[str, int], interval_s: float) -> None:
        self.trial, self.folder = trial, trial / FOLDER
        self.workers, self.layout, self.interval_s = workers, dict(layout), interval_s
        self.tag: str | None = None
        self._made = time.monotonic()
        self._told = False

    def due(self, step_s: float) -> bool:
        """Whether the interval will have passed after the next step, if that takes as long; by this worker's clock."""
        return time.monotonic() - self._made + step_s >= self.interval_s

    def save(self, engine: Engine, saved: Saved, place: Place) -> None:
        """Make a checkpoint, the valid one from then on.

        A trial of one process that cannot write it, on a full disk for example, goes on without.

        Args:
            engine: of the trial.
            saved: what it says.
            place: of this worker.

        Raises:
            OSError: it cannot be written, and there are other workers, which wait for it.
        """
        began = time.monotonic()
        try:
            self._write(engine, saved, place)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch and safetensors have their own
            if self.workers.count > 1:
                raise
            logger.warning("the checkpoint after step %d could not be written: %s", saved.step, error)
            shutil.rmtree(self.folder / saved.tag, ignore_errors=True)
        else:
            self.tag = saved.tag
        self._made = time.monotonic()
        self._tell_cost(self._made - began)

    def _write(self, engine: Engine, saved: Saved, place: Place) -> None:
        folder = self.folder / saved.tag
        engine.save(self.folder, saved.tag)
        place.write(folder / _worker_file(self.workers.rank))
        self.workers.wait()
        if self.workers.first:
            if saved.best_epoch is not None:
                _link(self.trial / BEST, folder / BEST)
            complete = saved.model_copy(update={"layout": self.layout, "files": _flushed(folder)})
            write_atomically(self.folder / _STATE, complete.model_dump_json())
            self._remove_others(saved.tag)
        self.workers.wait()

    def _remove_others(self, tag: str) -> None:
        for other in self.folder.iterdir():
            if other.is_dir() and other.name != tag:
                shutil.rmtree(other)

    def _tell_cost(self, took_s: float) -> None:
        if not self._told and took_s > _EXPENSIVE * self.interval_s > 0:
            self._told = True
            share = took_s / self.interval_s
            logger.warning(
                "a checkpoint took %.1f s, %.0f %% of resources.checkpoint_interval_s: %g", took_s, 100 * share,
                self.interval_s,
            )  # fmt: skip

    def read(self) -> Saved | None:
        """The valid checkpoint, which ``load`` loads; None: there is none, or none that can be used, which is logged.

        An old one, a broken one and one of another code do not fail the trial, which starts again from the beginning.
        """
        found: Saved | None = None
        if self.workers.first:
            try:
                found = self._checked()
            except BrokenCheckpointError as error:
                self.discard(error)
        return self.workers.agreed(found)

    def _checked(self) -> Saved | None:
        """The valid checkpoint; None: there is none.

        Raises:
            BrokenCheckpointError: it lacks a file, or a file has another size.
        """
        path = self.folder / _STATE
        try:
            saved = Saved.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BrokenCheckpointError(f"{path}: {str(error).splitlines()[0]}") from error
        for name, size in saved.files.items():
            file = self.folder / saved.tag / Path(name).name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                raise BrokenCheckpointError(f"{file}: found {found} bytes instead of {size}")
        self._remove_others(saved.tag)
        return saved

    def discard(self, why: object) -> None:
        """Remove what is there, because the trial starts again."""
        logger.warning("the checkpoint cannot be used, so the trial starts again: %s", why)
        shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, engine: Engine, saved: Saved) -> Place:
        """Load the engine's state and the best weights, and return this worker's place.

        Raises:
            BrokenCheckpointError: it could not be read.
        """
        folder = self.folder / saved.tag
        try:
            engine.load(self.folder, saved.tag)
            place = self._place(folder)
            if self.workers.first and saved.best_epoch is not None:
                _link(folder / BEST, self.trial / BEST)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch's reader raises many types
            raise BrokenCheckpointError(f"{folder}: {type(error).__name__}: {error}") from error
        self.workers.wait()
        self.tag, self._made = saved.tag, time.monotonic()
        return place

    def _place(self, folder: Path) -> Place:
        """This worker's place; a worker that was not there takes what is the same for all from the first one."""
        own, first = folder / _worker_file(self.workers.rank), folder / _worker_file(0)
        if own.exists():
            return Place.read(own)
        return Place(losses=Place.read(first).losses) if first.exists() else Place()


def _worker_file(rank: int) -> str:
    return f"worker-{rank}.safetensors"


def _link(source: Path, target: Path) -> None:
    """Make a file appear at another place too; it is replaced there and here, but never changed."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without
        shutil.copy2(source, target)


def _flushed(folder: Path) -> dict[str, int]:
    """Write all files of a folder to the disk; their sizes by name."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes
