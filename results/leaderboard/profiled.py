"""What a run's profile says about the rows of a leaderboard, as values and as text.

Speed and memory of a row are those of the profile (harness/core/profile.py): measured apart from training, each method
alone, in turn with the reference. What trials recorded while they trained depends on what else the machine did.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core.durations import duration
from harness.core.profile import Measured, Profile, ProfileEntry
from harness.core.record import Run
from results.leaderboard.format import ABSENT, number, ratio, size_text
from results.leaderboard.rows import Row

_VALUES = (
    "step_time_s", "step_time_ratio", "examples_per_s", "tokens_per_s", "peak_memory_bytes", "memory_ratio",
    "energy_j_per_step", "energy_ratio",
)  # fmt: skip


def entry_of(run: Run, row: Row) -> ProfileEntry | None:
    """The measured profile of a row; None if it has none."""
    if run.profile is None:
        return None
    found = (run.profile.entry_of(trial.trial_id) for trial in row.trials)
    return next((entry for entry in found if entry is not None and entry.step_time_ratio is not None), None)


def comparable(one: ProfileEntry | None, reference: ProfileEntry | None) -> bool:
    """Whether the ratios of an entry are to this reference: of a joined run, the other run's are not."""
    if one is None or reference is None or one.device != reference.device:
        return False
    return bool(set(one.reference_trial_ids) & set(reference.trial_ids))


@dataclass(frozen=True)
class Figures:
    """The measurements of an entry as text; a dash for what was not measured."""

    entry: ProfileEntry

    @property
    def step_time(self) -> str:
        """``1.13× [1.10, 1.17]``; the reference has its own time: ``42.1 ms``."""
        step_s = self.entry.step_time_s
        if self.entry.is_reference and step_s is not None:
            return f"{1e3 * step_s.median:.3g} ms" if step_s.median < 1 else duration(step_s.median)
        return ratio_text(self.entry.step_time_ratio)

    @property
    def speed(self) -> str:
        """Examples per second."""
        speed = self.entry.examples_per_s
        return ABSENT if speed is None else number(speed.median)

    @property
    def memory(self) -> str:
        """``42.1 MiB, 0.87×``; of the reference without a ratio."""
        peak, share = self.entry.peak_memory_bytes, self.entry.memory_ratio
        if peak is None:
            return ABSENT
        size = size_text(peak.median)
        return size if share is None or self.entry.is_reference else f"{size}, {ratio(share.median)}"

    @property
    def energy(self) -> str:
        """``3.1 J, 0.87× [0.85, 0.89]`` for a step; of the reference without a ratio."""
        joules = self.entry.energy_j_per_step
        if joules is None:
            return ABSENT
        text = f"{number(joules.median)} J"
        return text if self.entry.is_reference else f"{text}, {ratio_text(self.entry.energy_ratio)}"


def ratio_text(value: Measured | None) -> str:
    """``1.13× [1.10, 1.17]``; a dash if it was not measured."""
    if value is None:
        return ABSENT
    if value.low is None or value.high is None:
        return ratio(value.median)
    return f"{ratio(value.median)} [{ratio(value.low)[:-1]}, {ratio(value.high)[:-1]}]"


def profile_rows(profile: Profile | None) -> list[dict[str, object]]:
    """One row for each entry: names, device, and of every value the median and its interval; None if not measured."""
    rows = []
    for entry in profile.entries if profile else ():
        row: dict[str, object] = {
            "name": entry.name,
            "setting": entry.setting,
            "reference": entry.reference,
            "device": entry.device,
            "examples_per_step": entry.examples_per_step,
            "tokens_per_step": entry.tokens_per_step,
        }
        for name in _VALUES:
            value: Measured | None = getattr(entry, name)
            row[name] = value and value.median
            row[f"{name}_low"], row[f"{name}_high"] = (value.low, value.high) if value else (None, None)
        rows.append(row | {"reason": entry.reason, "trials": len(entry.trial_ids)})
    return rows
