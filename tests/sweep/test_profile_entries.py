"""From rounds to entries: medians of ratios within rounds, their intervals, and what is not measured."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from harness.core.profile import Measured, ProfileEntry, measured
from harness.sweep.profile_entries import completed, measured_entry, reference_entry
from harness.trial.profile import Answer, StageTimes

pytestmark = pytest.mark.quick


def entry(name: str) -> ProfileEntry:
    return ProfileEntry(
        key=name,
        name=name,
        setting="",
        trial_ids=(name,),
        reference="full",
        reference_trial_ids=("full",),
        device="cpu",
    )


def stage(
    step_s: list[float], share: float = 1.0, step_j: list[float] | None = None, tokens: float = 100.0
) -> StageTimes:
    joules = None if step_j is None else tuple(step_j)
    return StageTimes(share=share, step_s=tuple(step_s), step_j=joules, examples_per_step=16, tokens_per_step=tokens)


@pytest.mark.parametrize("n", [*range(1, 40), 101])
def test_the_interval_of_a_median_is_the_shortest_of_at_least_95_percent(n: int) -> None:
    found = measured([float(x) for x in range(1, n + 1)])
    assert found.median == (n + 1) / 2
    coverages = {k: 1 - 2 * binom.cdf(k - 1, n, 0.5) for k in range(1, n // 2 + 1)}  # of [k-th, (n+1-k)-th]
    enough = [k for k, coverage in coverages.items() if coverage >= 0.95]
    if not enough:
        assert n < 6
        assert (found.low, found.high) == (None, None)
    else:
        assert (found.low, found.high) == (max(enough), n + 1 - max(enough))


def test_the_interval_covers_the_true_ratio() -> None:
    """Rounds with the heavy tails of a disturbed machine, common to both models of a round."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        common = np.exp(rng.standard_t(2, 15))
        reference, own = common * np.exp(rng.normal(0, 0.05, 15)), 1.1 * common * np.exp(rng.normal(0, 0.05, 15))
        found = measured(list(own / reference))
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.1 <= found.high
    assert hits >= 0.93 * 400


def test_ratios_are_taken_within_a_round() -> None:
    """The machine was ten times slower in two rounds; ratios and the order of times do not see it."""
    slow = [1.0, 10.0, 1.0, 1.0, 10.0, 1.0, 1.0]
    answer = Answer(
        index=1, stages=(stage([2.0 * s for s in slow], tokens=60.0),), reference=(stage([4.0 * s for s in slow]),)
    )
    full = reference_entry(entry("full"), [answer.reference], peak_bytes=200)
    lora = completed(measured_entry(entry("lora"), answer, peak_bytes=50), full)
    assert lora.step_time_ratio == Measured(median=0.5, low=0.5, high=0.5, n=7)
    assert lora.step_time_s == Measured(median=2.0, low=2.0, high=2.0, n=7)
    assert lora.examples_per_s is not None
    assert lora.examples_per_s.median == 8.0
    assert lora.tokens_per_s is not None
    assert lora.tokens_per_s.median == 30.0
    assert lora.memory_ratio == Measured(median=0.25, n=1)
    assert (lora.energy_ratio, lora.energy_j_per_step, lora.stages) == (None, None, ())
    itself = completed(full, full)
    assert itself.step_time_ratio == Measured(median=1.0, n=7)
    assert itself.step_time_s is not None
    assert (itself.step_time_s.median, itself.is_reference) == (4.0, True)


def test_stages_count_by_their_share_of_the_steps() -> None:
    """A quarter of the steps take 1 s, the others 5 s: 4 s on average, beside 2 s."""
    stages = (stage([1.0] * 6, share=0.25, tokens=10.0), stage([5.0] * 6, share=0.75, tokens=50.0))
    answer = Answer(index=1, stages=stages, reference=(stage([2.0] * 6),))
    llava = measured_entry(entry("llava"), answer, None)
    assert llava.step_time_ratio is not None
    assert llava.step_time_ratio.median == 2.0
    assert llava.tokens_per_step == 40.0
    assert [(one.share, one.step_time_ratio.median) for one in llava.stages] == [(0.25, 0.5), (0.75, 2.5)]
    assert llava.peak_memory_bytes is None


def test_energy_where_the_device_tells_it() -> None:
    answer = Answer(
        index=1,
        stages=(stage([1.0] * 6, step_j=[3.0, 3.0, 3.3, 3.0, 2.7, 3.0]),),
        reference=(stage([1.0] * 6, step_j=[6.0] * 6),),
    )
    full = reference_entry(entry("full"), [answer.reference], None)
    lora = completed(measured_entry(entry("lora"), answer, None), full)
    assert lora.energy_ratio is not None
    assert (lora.energy_ratio.median, lora.energy_ratio.high) == (0.5, 3.3 / 6)
    assert lora.energy_j_per_step is not None
    assert lora.energy_j_per_step.median == 3.0
    unread = answer.model_copy(update={"reference": (stage([1.0] * 6, step_j=[0.0] * 6),)})  # the counter stood still
    assert measured_entry(entry("lora"), unread, None).energy_ratio is None
