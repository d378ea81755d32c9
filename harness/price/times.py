"""Times that were measured: by a probe, or by trials that have finished."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harness.core.forecast import Duration
from harness.core.probed import Probed
from harness.experiment.plan import TrialSpec
from harness.price.duration import START_S, Amounts, scored, training_s

_PROBED = (0.7, 1.6)  # of what a probe says: evaluation is probed on few examples, and trials run beside one another
_ALONE = (0.7, 1.4)  # of the time of one finished trial
_OTHERS = 1.5  # beyond what other shapes' trials took, by the arithmetic


def step_from(probed: Probed) -> Duration:
    """The time of an optimizer step."""
    ordered = sorted(probed.step_s)
    return Duration(low_s=ordered[0], middle_s=statistics.median(ordered), high_s=ordered[-1], source="probe")


def encoding_from(seconds: float) -> Duration:
    """The time of encoding that was measured."""
    low, high = (seconds * factor for factor in _PROBED)
    return Duration(low_s=low, middle_s=seconds, high_s=high, source="probe")


def trial_from(probed: Probed, spec: TrialSpec, amounts: Amounts) -> Duration:
    """The time of a trial, from its measured steps, scored references and generated texts."""
    training = training_s(statistics.median(probed.step_s), spec, amounts)
    scoring, generating = scored(spec, amounts) * probed.reference_s, amounts.texts * probed.text_s
    middle = START_S + probed.build_s + amounts.files * probed.file_s + training + scoring + generating
    low, high = (middle * factor for factor in _PROBED)
    return Duration(low_s=low, middle_s=middle, high_s=high, source="probe")


def recorded(wall_times_s: Sequence[float]) -> Duration:
    """The time of a trial, from finished trials of its shape."""
    middle = statistics.median(wall_times_s)
    low, high = min(*wall_times_s, middle * _ALONE[0]), max(*wall_times_s, middle * _ALONE[1])
    return Duration(low_s=low, middle_s=middle, high_s=high, source="records")


def calibrated(rough: Duration, ratios: Sequence[float]) -> Duration:
    """A time by arithmetic, corrected by how long other shapes' trials took.

    Args:
        rough: the time.
        ratios: of finished trials: seconds taken to seconds by arithmetic.
    """
    middle = rough.middle_s * statistics.median(ratios)
    low, high = rough.middle_s * min(ratios) / _OTHERS, rough.middle_s * max(ratios) * _OTHERS
    return Duration(low_s=low, middle_s=middle, high_s=high, source="records")
