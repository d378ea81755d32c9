"""Candidates of a search: how many halving keeps, and which of them is ahead."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from harness.core.search import Halving, ranked

pytestmark = pytest.mark.quick


def test_halving_keeps_a_share_of_the_candidates_rounded_up() -> None:
    halving = Halving(rungs=(1, 3), reduction_factor=2)
    assert [halving.kept(8, n) for n in (0, 1, 2)] == [8, 4, 2]
    assert [halving.kept(n) for n in (1, 2, 3, 5)] == [1, 1, 1, 2]
    assert Halving(rungs=(1,), reduction_factor=3).kept(7) == 3


def test_rungs_ascend() -> None:
    with pytest.raises(ValidationError, match="ascending order"):
        Halving(rungs=(2, 2))


def test_candidates_are_ranked_by_the_mean_over_the_seeds_that_all_of_them_have() -> None:
    assert ranked([{0: 3.0, 1: 5.0}, {0: 2.0, 1: 5.0}, {0: 4.0, 1: 3.5}]) == [1, 2, 0]
    assert ranked([{0: 3.0, 1: 5.0}, {0: 1.0}]) == [0], "fewer seeds: not chosen, however good"
    assert ranked([{0: 3.0, 1: 1.0}, {1: 2.0, 2: 0.5}]) == [0, 1], "seed 1 decides, which both have"
    assert ranked([{0: 2.0}, {0: 2.0}]) == [0, 1], "of equal candidates the first"
    assert ranked([{}, {}]) == []
