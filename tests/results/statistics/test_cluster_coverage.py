"""Coverage of the intervals where examples share inputs, in simulations with clusters of unequal sizes.

Axes: S seeds, E examples, G clusters, B resamples, K columns.
"""

from __future__ import annotations

import numpy as np
import pytest

from harness.core.formulas import Floats
from results.statistics.intervals import estimate, resample_weights
from results.statistics.resample import Clusters

REPETITIONS = 500


def coverage(clusters: int, within: float, seeds: int, seed_sd: float, plain: bool = False) -> float:
    """How often the interval of a mean score holds the truth, 0.

    Args:
        clusters: of each test set, of 1 to about 25 examples (geometric, 5 on average).
        within: intra-cluster correlation of the examples' scores.
        seeds: of the row.
        seed_sd: standard deviation of the seeds' effect, in those of an example.
        plain: resample examples, as if nothing were shared.
    """
    rng = np.random.default_rng([clusters, seeds])
    held = 0
    for _ in range(REPETITIONS):
        sizes_G = rng.geometric(0.2, clusters)
        cluster_E = np.repeat(np.arange(clusters), sizes_G)
        shared_G = rng.normal(0, np.sqrt(within), clusters)
        example_E = shared_G[cluster_E] + rng.normal(0, np.sqrt(1 - within), len(cluster_E))
        scores_SE = example_E + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, 0.3, (seeds, len(cluster_E)))
        names = range(len(cluster_E)) if plain else cluster_E
        drawn = Clusters([str(name) for name in names])
        sums_SKG = drawn.sums(np.stack([scores_SE, np.ones_like(scores_SE)], axis=1))
        sums_SKB = sums_SKG @ resample_weights(drawn.count).T.astype(float)
        replicates_B: Floats = (sums_SKB[:, 0] / sums_SKB[:, 1]).mean(axis=0)
        found = estimate(scores_SE.mean(axis=1).tolist(), replicates_B, drawn.count)
        held += found is not None and not found.excludes(0)
    return held / REPETITIONS


@pytest.mark.slow
@pytest.mark.parametrize("within", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.02), (5, 0.2)])
@pytest.mark.parametrize("clusters", [20, 60])
def test_intervals_cover_where_examples_share_inputs(clusters: int, seeds: int, seed_sd: float, within: float) -> None:
    assert coverage(clusters, within, seeds, seed_sd) >= 0.93


@pytest.mark.slow
def test_resampling_examples_covers_far_less() -> None:
    assert coverage(60, 0.9, 3, 0.02, plain=True) < 0.7
    assert coverage(60, 0.3, 3, 0.02, plain=True) < 0.85


def test_clusters_add_up_whatever_their_order() -> None:
    columns_KE = np.arange(10.0).reshape(2, 5)
    found = Clusters(["b", "a", "b", "c", "a"])
    assert found.count == 3
    assert found.sums(columns_KE).tolist() == [[2, 5, 3], [12, 15, 8]]  # b, a, c
    assert Clusters(list("abcde")).sums(columns_KE) is columns_KE
