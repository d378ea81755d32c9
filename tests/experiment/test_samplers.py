"""Learning rates that are proposed: the same on every machine and in every rerun."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.search import Range, Search
from harness.experiment.samplers import first_candidates, next_candidate

WIDE = Range(log_uniform=(1e-4, 1e-2))


def search(**options: Any) -> Search:
    return Search(**{"learning_rate": WIDE, "candidates": 4, "sampler": "random", **options})


def test_a_grid_has_both_ends_and_equal_steps() -> None:
    assert first_candidates(search(sampler="grid", candidates=5)) == (1e-4, 3.162e-4, 1e-3, 3.162e-3, 1e-2)
    even = Range(uniform=(1e-3, 3e-3))
    assert first_candidates(search(sampler="grid", candidates=3, learning_rate=even)) == (1e-3, 2e-3, 3e-3)
    assert first_candidates(search(sampler="grid", candidates=1)) == (1e-3,)
    assert first_candidates(search(sampler="grid", learning_rate=(3e-3, 1e-3))) == (3e-3, 1e-3), "values as they are"


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_drawn_candidates_depend_on_the_seed_alone_and_a_longer_search_begins_with_them(sampler: str) -> None:
    four = first_candidates(search(sampler=sampler))
    assert len(set(four)) == 4
    assert all(1e-4 <= rate <= 1e-2 for rate in four)
    assert first_candidates(search(sampler=sampler)) == four
    assert first_candidates(search(sampler=sampler, candidates=8))[:4] == four
    assert first_candidates(search(sampler=sampler, seed=1)) != four
    assert all(float(f"{rate:.4g}") == rate for rate in four)


def test_quasi_random_candidates_are_spread_evenly() -> None:
    """Four points of a Sobol sequence: one in each quarter of the range, on its logarithmic scale."""
    quarters = [int(2 * (math.log10(rate) + 4)) for rate in first_candidates(search(sampler="qmc"))]
    assert sorted(quarters) == [0, 1, 2, 3]


def test_a_sampler_that_learns_begins_with_half_at_random_and_then_follows_the_results() -> None:
    tpe = search(sampler="tpe", candidates=16)
    first = first_candidates(tpe)
    assert first == first_candidates(search(candidates=8))

    def best_near(optimum: float) -> float:
        found: list[tuple[float, float | None]] = [(rate, abs(rate / optimum - 1)) for rate in first]
        while len(found) < 16:
            rate = next_candidate(tpe, found)
            assert rate not in [known for known, _ in found]
            found.append((rate, abs(rate / optimum - 1)))
        later = [rate for rate, _ in found[8:]]
        return sum(later) / len(later)

    low, high = best_near(2e-4), best_near(8e-3)
    assert low < 2e-3 < high
    assert best_near(8e-3) == high, "the same results, the same candidates"


def test_a_gaussian_process_follows_the_results_too() -> None:
    gp = search(sampler="gp", candidates=8)
    first = first_candidates(gp)
    assert first == first_candidates(search(candidates=4))

    def proposed(optimum: float) -> list[float]:
        found: list[tuple[float, float | None]] = [(rate, math.log(rate / optimum) ** 2) for rate in first]
        while len(found) < 8:
            rate = next_candidate(gp, found)
            found.append((rate, math.log(rate / optimum) ** 2))
        return [rate for rate, _ in found[4:]]

    low, high = proposed(2e-4), proposed(8e-3)
    assert all(1e-4 <= rate <= 1e-2 for rate in (*low, *high))
    assert len(set(first) | set(low)) == len(set(first) | set(high)) == 8
    assert min(abs(math.log(rate / 2e-4)) for rate in low) < 0.3
    assert min(abs(math.log(rate / 8e-3)) for rate in high) < 0.3
    assert proposed(8e-3) == high, "the same results, the same candidates"


def test_a_failed_candidate_teaches_nothing() -> None:
    tpe = search(sampler="tpe")
    assert next_candidate(tpe, [(1e-3, None), (2e-3, None)]) != 1e-3
    assert next_candidate(tpe, [(1e-3, 3.0), (5e-3, None)]) == next_candidate(tpe, [(1e-3, 3.0), (6e-3, None)])


def test_a_range_without_room_is_an_error() -> None:
    narrow = Range(log_uniform=(1e-3, 1.0001e-3))
    with pytest.raises(UserError, match="too narrow for 4 learning rates"):
        first_candidates(search(learning_rate=narrow))
