"""Scales: there and back, and what differences look like on them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from harness.core.record import MetricInfo
from results.statistics.scales import Scale, scale_of

pytestmark = pytest.mark.quick

LOG = Scale("log", 1.0)
LOGIT = Scale("logit", 0.0, 1.0, shift=1 / 200)
PLAIN = Scale("identity")


def test_metrics_have_the_scale_of_their_bounds() -> None:
    def of(**fields: object) -> tuple[str, float | None, float | None]:
        info = MetricInfo.model_validate({"label": "x", "higher_is_better": True} | fields)
        return info.scale, info.lower, info.upper

    assert of(name="perplexity") == of(name="speech/perplexity") == ("log", 1.0, None)
    assert of(name="exact_match", lower=0, upper=1) == ("logit", 0.0, 1.0)
    assert of(name="bleu_4", corpus="bleu") == ("logit", 0.0, 1.0)
    assert of(name="wer", lower=0, corpus="ratio") == ("identity", 0.0, None)
    assert of(name="cider") == ("identity", None, None)
    stored = MetricInfo(name="perplexity", label="x", higher_is_better=False)
    assert MetricInfo.model_validate_json(stored.model_dump_json()) == stored


@pytest.mark.parametrize(
    ("scale", "scores"), [(LOG, [1.0, 2.8, 47.0]), (LOGIT, [0.0, 0.004, 0.5, 1.0]), (PLAIN, [-3.0, 0.0, 7.0])]
)
def test_there_and_back(scale: Scale, scores: list[float]) -> None:
    assert scale.inverse(scale.forward(scores)) == pytest.approx(scores, abs=1e-12)
    for score in scores[1:3]:
        step = 1e-6 * max(abs(score), 1e-3)
        slope = (scale.forward(score + step) - scale.forward(score - step)) / (2 * step)
        assert scale.slope(score) == pytest.approx(slope, rel=1e-4)


def test_half_an_example_is_added_to_both_sides() -> None:
    assert LOGIT.forward(0.3) == pytest.approx(logit((30 + 0.5) / 101))
    assert LOGIT.forward(0.0) == pytest.approx(logit(0.5 / 101))


@pytest.mark.parametrize("scale", [LOG, LOGIT, PLAIN])
def test_nothing_leaves_the_bounds(scale: Scale) -> None:
    z = np.array([-1e9, -800.0, -1.0, 0.0, 1.0, 800.0, 1e9])
    x = scale.inverse(z)
    assert np.all(np.isfinite(x))
    assert np.all((x >= scale.lower) & (x <= scale.upper))
    assert np.all(np.diff(x) >= 0)


@pytest.mark.parametrize(("scale", "one", "other"), [(LOG, 3.0, 2.5), (LOGIT, 0.9, 0.35), (PLAIN, 2.0, 7.0)])
def test_a_difference_is_that_of_the_scores_and_grows(scale: Scale, one: float, other: float) -> None:
    z = scale.forward(one), scale.forward(other)
    shown = scale.difference(*z, z[0] - z[1])
    assert shown == pytest.approx(one / other if scale.kind == "log" else one - other)
    changes = scale.difference(*z, np.linspace(-2, 2, 41))
    assert np.all(np.diff(changes) > 0)
    assert changes[20] == pytest.approx(scale.null)
    assert scale.difference(*z, np.array([-1e6, 1e6])) == pytest.approx(changes[[0, -1]], rel=np.inf)  # finite


def test_rows_of_shares_keep_their_mean() -> None:
    scores_RS = np.array([[0.0, 0.2, 0.1], [0.9, 1.0, np.nan]])
    z_RS = LOGIT.rows(scores_RS)
    assert LOGIT.inverse(np.nanmean(z_RS, axis=1)) == pytest.approx([0.1, 0.95])
    assert LOG.rows(np.array([[2.0, 8.0]])).mean() == pytest.approx(np.log(4))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_the_margin_is_what_means_may_differ_by(share: float) -> None:
    z = LOGIT.forward(share)
    found = LOGIT.margin(z, z, 0.01)
    assert LOGIT.difference(z, z, found) == pytest.approx(0.01)
    assert expit(LOGIT.margin(np.zeros(1), np.zeros(1), 0.1) / 2) == pytest.approx(0.5 + 0.05 / 1.01)
    assert LOG.margin(z, z, 0.01) == pytest.approx(np.log(1.01))
    assert PLAIN.margin(z, z, 0.01) == pytest.approx(0.01)


def test_a_metric_that_is_bounded_below_alone_is_compared_as_it_is() -> None:
    wer = scale_of(MetricInfo(name="wer", label="WER", higher_is_better=False, lower=0))
    assert (wer.kind, wer.lower) == ("identity", 0.0)
    assert wer.inverse(-0.2) == 0
