"""Coverage of the intervals where examples share inputs, in simulations with clusters of unequal sizes.

Axes: S seeds, E examples, G clusters, B resamples, K columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness.core.formulas import Floats
from harness.core.record import MetricInfo
from harness.model.build import Splits
from harness.trial.evaluate import Likelihood
from harness.trial.scores import write_examples
from results.statistics.example_scores import Examples, read_examples
from results.statistics.intervals import estimate, resample_weights
from results.statistics.resample import Clusters, Resampled
from tasks.base import Scores
from tasks.vqa import VQA, _write_vqav2
from tests.support.runs import fake_plan, fake_record

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


def test_intervals_of_questions_about_the_same_pictures_widen(tmp_path: Path) -> None:
    """VQA's sample with a test split of two questions per picture, which are answered alike."""
    options = VQA.sample(tmp_path)
    _write_vqav2(tmp_path, "test2014", range(30, 54), questions=2)
    test = list(VQA(VQA.Config.model_validate(options | {"test": "test2014"})).examples("test"))
    rng = np.random.default_rng(0)
    hard = {example.inputs[0].value: rng.normal() for example in test}
    nll = np.array([8 + 2 * hard[example.inputs[0].value] + 0.2 * rng.normal() for example in test])
    ones = np.ones(len(test), int)
    likelihood, empty = Likelihood(nll, 4 * ones, nll, 4 * ones), Likelihood(*(np.zeros(0) for _ in range(4)))
    scores = Scores({}, {example.id: {} for example in test})
    path = tmp_path / "examples.parquet"
    write_examples(path, Splits([], [], test), empty, likelihood, None, {example.id: "red" for example in test}, scores)
    metric = MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False)
    found = read_examples(path, {"perplexity": metric}, {"perplexity": likelihood.perplexity})
    assert found.clusters is not None
    record = fake_record(fake_plan().trials[0], 1, 0.5)
    record = record.model_copy(update={"metrics": {"test": {"perplexity": likelihood.perplexity}}})
    errors = {}
    for clusters in (None, found.clusters):
        resampled = Resampled([record], [metric], [Examples(found.ids, found.columns, clusters)])
        one = resampled.estimate([record], "perplexity")
        assert one is not None
        assert one.example_se is not None
        errors[one.examples] = one.example_se
    assert list(errors) == [48, 24]
    # Two answers that are alike tell as much as one: the variance is twice as large.
    assert errors[24] / errors[48] == pytest.approx(np.sqrt(2), rel=0.1)
