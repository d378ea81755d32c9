"""From measured rounds to the entries of a profile: ratios within rounds, their median, and its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from harness.core.profile import Measured, ProfiledStage, ProfileEntry, measured
from harness.sweep.profile_plan import Wanted
from harness.trial.measure import versions
from harness.trial.profile import Answer, StageTimes

_ONE = 1.0  # the ratio of the reference to itself


def bare(wanted: Wanted, reference: Wanted, key: str, device: str, reason: str | None) -> ProfileEntry:
    """An entry without measurements."""
    return ProfileEntry(
        key=key,
        name=wanted.name,
        setting=wanted.setting,
        trial_ids=wanted.trial_ids,
        reference=reference.name,
        reference_trial_ids=reference.trial_ids,
        device=device,
        reason=reason,
    )


def measured_entry(entry: ProfileEntry, answer: Answer, peak_bytes: int | None) -> ProfileEntry:
    """An entry with its ratios; what needs the reference's own figures comes with ``completed``.

    A method with several stages is measured by the mean of their steps, each stage by its share of the trial's steps.
    """
    reference = _whole([times.step_s for times in answer.reference], answer.reference)
    own = _whole([times.step_s for times in answer.stages], answer.stages)
    return entry.model_copy(
        update={
            **_sizes(answer.stages, peak_bytes),
            "step_time_ratio": _ratio(own, reference),
            "energy_ratio": _energy_ratio(answer),
            "stages": tuple(
                ProfiledStage(share=one.share, step_time_ratio=_ratio(one.step_s, reference)) for one in answer.stages
            )
            if len(answer.stages) > 1
            else (),
        }
    )


def reference_entry(
    entry: ProfileEntry, rounds: Sequence[tuple[StageTimes, ...]], peak_bytes: int | None
) -> ProfileEntry:
    """The entry of a reference, from its steps in the rounds of all methods."""
    seconds = [x for stages in rounds for x in _whole([times.step_s for times in stages], stages)]
    joules = [x for stages in rounds for x in _joules(stages)]
    return entry.model_copy(
        update={
            **_sizes(rounds[0], peak_bytes),
            "step_time_s": measured(seconds),
            "step_time_ratio": Measured(median=_ONE, n=len(seconds)),
            "energy_j_per_step": measured(joules) if joules else None,
            "energy_ratio": Measured(median=_ONE, n=len(joules)) if joules else None,
        }
    )


def completed(entry: ProfileEntry, reference: ProfileEntry) -> ProfileEntry:
    """The entry with times and speeds: those of the reference, by the ratio; and with the ratio of the memory."""
    own, other = entry.peak_memory_bytes, reference.peak_memory_bytes
    step_s = entry.step_time_s if entry is reference else _scaled(entry.step_time_ratio, reference.step_time_s)
    joules = reference.energy_j_per_step
    return entry.model_copy(
        update={
            "step_time_s": step_s,
            "examples_per_s": _per_second(entry.examples_per_step, step_s),
            "tokens_per_s": _per_second(entry.tokens_per_step, step_s),
            "energy_j_per_step": joules if entry is reference else _scaled(entry.energy_ratio, joules),
            "memory_ratio": Measured(median=own.median / other.median, n=1) if own and other and other.median else None,
        }
    )


def _sizes(stages: Sequence[StageTimes], peak_bytes: int | None) -> dict[str, object]:
    return {
        "examples_per_step": sum(one.share * one.examples_per_step for one in stages),
        "tokens_per_step": sum(one.share * one.tokens_per_step for one in stages),
        "peak_memory_bytes": None if peak_bytes is None else Measured(median=float(peak_bytes), n=1),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def _whole(values: Sequence[Sequence[float]], stages: Sequence[StageTimes]) -> list[float]:
    """By round the mean over the stages, weighted by their shares of the steps."""
    return [sum(one.share * x for one, x in zip(stages, row, strict=True)) for row in zip(*values, strict=True)]


def _joules(stages: Sequence[StageTimes]) -> list[float]:
    """By round; empty where the device does not tell."""
    known = [one.step_j for one in stages if one.step_j is not None]
    return _whole(known, stages) if known and len(known) == len(stages) else []


def _ratio(own: Sequence[float], reference: Sequence[float]) -> Measured:
    return measured([x / y for x, y in zip(own, reference, strict=True)])


def _energy_ratio(answer: Answer) -> Measured | None:
    own, reference = _joules(answer.stages), _joules(answer.reference)
    return _ratio(own, reference) if own and min(reference, default=0.0) > 0 else None


def _mapped(value: Measured, change: Callable[[float], float]) -> Measured:
    """A monotonic function of a measured value."""
    ends = sorted(change(end) for end in (value.low, value.high) if end is not None)
    low, high = ends if ends else (None, None)
    return Measured(median=change(value.median), low=low, high=high, n=value.n)


def _scaled(ratio: Measured | None, reference: Measured | None) -> Measured | None:
    return _mapped(ratio, lambda x: x * reference.median) if ratio and reference else None


def _per_second(count: float | None, step_s: Measured | None) -> Measured | None:
    return _mapped(step_s, lambda x: count / x) if count is not None and step_s else None
