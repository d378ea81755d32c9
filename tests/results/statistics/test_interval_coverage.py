"""Coverage of the intervals of single means, in simulations of trials with known true values.

Axes: R repetitions, S seeds, E examples, K columns of a corpus score.
"""

from __future__ import annotations

import numpy as np
import pytest

from harness.core.formulas import Floats, score
from harness.core.record import MetricInfo
from results.statistics.intervals import estimate, resample_weights

E = 100
WEIGHTS_BE = resample_weights(E).astype(float)
# Standard deviations of the seeds' effects, the examples', and of a seed on an example.
RATIOS = {
    "seeds dominate": (1.0, 1.0, 0.5),
    "examples dominate": (0.01, 1.0, 0.1),
    "equal": (0.1, 1.0, 0.3),  # a hundred examples err as much as one seed
    "seeds tiny": (0.0003, 1.0, 0.0),
    "nothing but interaction": (0.0, 0.0, 1.0),
}


def trials(rng: np.random.Generator, shape: tuple[int, ...], ratio: str) -> Floats:
    """(…, S, E) scores whose expectation is 0: an effect of the seed, one of the example, one of both."""
    *others, seeds, examples = shape
    seed, example, both = RATIOS[ratio]
    return (
        rng.normal(0, seed, (*others, seeds, 1))
        + rng.normal(0, example, (*others, 1, examples))
        + rng.normal(0, both, shape)
    )


def coverage(scores_RSE: Floats, truth: float) -> float:
    """How often the interval of the mean score holds the truth."""
    replicates_RB = scores_RSE.mean(axis=1) @ WEIGHTS_BE.T / E
    found = [
        estimate(list(by_seed), replicates_B, E)
        for by_seed, replicates_B in zip(scores_RSE.mean(axis=2), replicates_RB, strict=True)
    ]
    return float(np.mean([one is not None and one.low is not None and not one.excludes(truth) for one in found]))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("ratio", RATIOS)
def test_interval_covers_seeds_and_examples(ratio: str, seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    assert coverage(trials(rng, (1000, seeds, E), ratio), 0.0) >= 0.93


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("ratio", ["seeds dominate", "examples dominate", "equal"])
def test_interval_of_a_paired_difference_covers_it(ratio: str, seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    shared_RE = 5 * rng.normal(size=(1000, 1, E))  # hard and easy examples are so for both methods
    one = shared_RE + 0.7 + trials(rng, (1000, seeds, E), ratio)
    other = shared_RE + trials(rng, (1000, seeds, E), ratio)
    assert coverage(one - other, 0.7) >= 0.93


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("seed_effect", [0.001, 0.05, 0.2])
def test_interval_covers_the_mean_of_skewed_examples(seed_effect: float, seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    examples_RE = rng.lognormal(0, 1, (1000, 1, E))  # skewness 6; Student's t alone covers 0.915
    scores = examples_RE + rng.normal(0, seed_effect, (1000, seeds, 1))
    assert coverage(scores, float(np.exp(0.5))) >= 0.93


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("level", [0.0, 2.0])
def test_interval_covers_the_share_of_right_answers(level: float, seeds: int) -> None:
    """Each seed, example and their pair shift the probit of a right answer; the share is that of their sum."""
    rng = np.random.default_rng(seeds)
    seed, example = 0.2, 1.0
    probit = level + rng.normal(0, seed, (1000, seeds, 1)) + rng.normal(0, example, (1000, 1, E))
    right = (rng.normal(size=(1000, seeds, E)) < probit).astype(float)
    many = rng.normal(level, np.sqrt(1 + seed**2 + example**2), 1_000_000)
    assert coverage(right, float(np.mean(many > 0))) >= 0.93


def corpus_coverage(metric: MetricInfo, columns_RSEK: Floats, truth: float) -> float:
    held = []
    for columns_SEK in columns_RSEK:
        sums_SBK = np.einsum("be,sek->sbk", WEIGHTS_BE, columns_SEK, optimize=True)
        found = estimate(score(metric, columns_SEK.sum(axis=1)).tolist(), score(metric, sums_SBK).mean(axis=0), E)
        assert found is not None
        assert found.covers == "seeds and test examples"
        held.append(not found.excludes(truth))
    return float(np.mean(held))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("seed_effect", [0.01, 0.2])
def test_interval_covers_a_ratio(seed_effect: float, seeds: int) -> None:
    """Errors of words: long examples are harder, so that the mean of the examples' rates is another number."""
    rng = np.random.default_rng(seeds)
    words = rng.integers(3, 20, (500, 1, E)) * np.ones((1, seeds, 1))
    rate = 0.2 * np.exp(rng.normal(-(seed_effect**2) / 2, seed_effect, (500, seeds, 1))) * words / 11
    errors = rng.poisson(rate * words * rng.gamma(2, 0.5, (500, 1, E)))
    lengths = np.arange(3, 20)
    truth = 0.2 * float(np.mean(lengths**2) / 11 / np.mean(lengths))
    metric = MetricInfo(name="wer", label="WER", higher_is_better=False, corpus="ratio")
    assert corpus_coverage(metric, np.stack([errors, words], axis=-1), truth) >= 0.93


@pytest.mark.parametrize("seed_effect", [0.002, 0.04])
def test_interval_covers_bleu(seed_effect: float) -> None:
    rng = np.random.default_rng(4)
    repetitions, seeds = 300, 3
    rates_4 = np.array([0.7, 0.5, 0.35, 0.25])

    def columns(seed_RS: Floats, examples: int) -> Floats:
        """(R, S, E, 10): matching and predicted n-grams, words, words of the references."""
        words = rng.integers(8, 14, (len(seed_RS), 1, examples, 1)) * np.ones((1, seed_RS.shape[1], 1, 1))
        guesses = words - np.arange(4)
        easy = rng.uniform(-0.2, 0.2, (len(seed_RS), 1, examples, 1))
        matches = rng.binomial(guesses.astype(int), np.clip(rates_4 + seed_RS[..., None, None] + easy, 0, 1))
        return np.concatenate([matches, guesses, words, words + 1], axis=-1)

    metric = MetricInfo(name="bleu_4", label="BLEU-4", higher_is_better=True, corpus="bleu")
    many = columns(rng.normal(0, seed_effect, (1, 200)), 3000)[0]
    truth = float(score(metric, many.sum(axis=1)).mean())
    drawn = columns(rng.normal(0, seed_effect, (repetitions, seeds)), E)
    assert corpus_coverage(metric, drawn, truth) >= 0.93


def test_bootstrap_over_three_seeds_covers_far_less() -> None:
    """What the intervals are not made of: percentiles over redrawn seeds, without and with redrawn examples."""
    rng = np.random.default_rng(0)
    scores_RSE = trials(rng, (1000, 3, E), "seeds dominate")
    drawn_BS = np.stack([np.bincount(draw, minlength=3) for draw in rng.integers(0, 3, (1000, 3))]) / 3.0
    plain_RB = scores_RSE.mean(axis=2) @ drawn_BS.T
    hierarchical_RB = np.stack([np.sum((WEIGHTS_BE @ one_SE.T / E) * drawn_BS, axis=1) for one_SE in scores_RSE])
    for replicates_RB, most in ((plain_RB, 0.8), (hierarchical_RB, 0.82)):
        low, high = np.quantile(replicates_RB, (0.025, 0.975), axis=1)
        assert 0.6 < np.mean((low <= 0) & (high >= 0)) < most
    assert coverage(scores_RSE, 0.0) >= 0.93
