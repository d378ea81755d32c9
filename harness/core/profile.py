"""Schema of ``profile.json`` in a run folder: speed, memory and energy of its methods, measured apart from training.

The times in trial records depend on what else the machine did while a trial ran. Here every method is measured alone on
the device, interleaved with a reference, so that only the ratios to the reference are compared. ``harness profile``
writes the file (harness/trial/profile.py says how it measures); results read it without torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat

from harness.core.files import write_atomically
from harness.core.schema import Schema, read_strictly

FILE_NAME = "profile.json"
_TAIL = 0.025  # probability that a median is below the interval, and that it is above


class Measured(Schema):
    """A median over repeated measurements, with an interval of at least 95 % by order statistics.

    Without an interval (``low`` and ``high`` None) there were too few measurements for one (fewer than six), or the
    value is one by definition: the ratio of the reference to itself.
    """

    median: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    n: int  # measurements


def measured(values: Sequence[float]) -> Measured:
    """The median of repeated measurements, and its interval of at least 95 % without assuming a distribution.

    The interval is from the k-th smallest to the k-th largest value, with the largest k for which a binomial variable
    of n trials with probability 1/2 is below k with a probability of at most 2.5 % (H. A. David and H. N. Nagaraja,
    Order Statistics, 3rd edition, section 7.1).
    """
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0
    while (below := below + math.comb(n, k) / 2**n) <= _TAIL:
        k += 1
    median = statistics.median(ordered)
    return Measured(median=median, low=ordered[k - 1], high=ordered[-k], n=n) if k else Measured(median=median, n=n)


class ProfiledStage(Schema):
    """One training stage of a method that has several, such as LLaVA."""

    share: FiniteFloat  # of the trial's steps, 0 to 1
    step_time_ratio: Measured


class ProfileEntry(Schema):
    """One method with its options and grouping, on one backbone with one batch shape. Unmeasured values are None.

    A step is an optimizer step, with all batches that its gradient is accumulated over. Ratios are to the reference of
    the same setting: 1 is equal, 2 is twice the time or memory. Times are those of the reference multiplied by the
    ratio, so that they have the order of the ratios, whatever the machine did when an entry was measured.
    """

    key: str  # SHA-256 of all that the measurement depends on: an entry with another key is measured again
    name: str  # "LoRA r=4 specific"
    setting: str  # as in the plan, without the number of examples and epochs, which do not affect a step
    trial_ids: tuple[str, ...]  # of all seeds and learning rates
    reference: str  # name of the entry that it was interleaved with; its own name if it is the reference
    reference_trial_ids: tuple[str, ...]
    device: str
    reason: str | None = None  # why it, or its memory, was not measured, in one line; None if all was
    examples_per_step: FiniteFloat | None = None
    tokens_per_step: FiniteFloat | None = None  # positions that the language model processes, padding excluded
    step_time_s: Measured | None = None
    step_time_ratio: Measured | None = None
    examples_per_s: Measured | None = None
    tokens_per_s: Measured | None = None
    # Growth from before the model was built to the peak of training, in a process of its own.
    peak_memory_bytes: Measured | None = None
    memory_ratio: Measured | None = None
    energy_j_per_step: Measured | None = None  # of the whole device; None where it does not tell
    energy_ratio: Measured | None = None
    stages: tuple[ProfiledStage, ...] = ()  # only of a method with several; the values above are over all of them
    measured_at: str = ""  # ISO 8601, UTC
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def is_reference(self) -> bool:
        """Whether it is the entry that others of its setting are compared with."""
        return self.trial_ids == self.reference_trial_ids


class Profile(Schema):
    """``profile.json``: the entries of a run, in the order of its plan."""

    schema_version: Literal[1] = 1
    entries: tuple[ProfileEntry, ...] = ()

    @cached_property
    def _by_trial(self) -> dict[str, ProfileEntry]:
        return {trial_id: entry for entry in reversed(self.entries) for trial_id in entry.trial_ids}

    def entry_of(self, trial_id: str) -> ProfileEntry | None:
        """The entry of a trial's method; None if it has none (yet)."""
        return self._by_trial.get(trial_id)


def profile_path(run: Path) -> Path:
    """Path of the profile in a run folder."""
    return run / FILE_NAME


def read_profile(run: Path) -> Profile | None:
    """Read the profile of a run folder; None if it has none.

    Raises:
        ValueError: the file is not a profile of this schema; the message names the file.
    """
    path = profile_path(run)
    try:
        return read_strictly(Profile, path, "the profile of a run")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path}: not the profile of a run: {error}") from error


def write_profile(run: Path, profile: Profile) -> None:
    """Write the profile atomically: readers see the complete old or the complete new file."""
    write_atomically(profile_path(run), profile.model_dump_json(indent=1) + "\n")
