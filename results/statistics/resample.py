"""The trials of one setting on resampled test examples, for intervals over examples and paired tests.

Axes: B resamples, E examples, G clusters of examples, K columns of a score
(``results/statistics/example_scores.py``), R rows. Every trial has the same resamples, so differences between trials
are paired by example.

Examples that share an input (questions about one picture) are drawn together: what varies between test
sets is the picture. Scores depend on sums over examples alone, so all that follows works on the sums of the clusters,
and their number, not that of the examples, gives the degrees of freedom. Where nothing is shared, a cluster is an
example.

A corpus score is recomputed from the columns of the drawn examples: BLEU from their n-gram counts, perplexity from
their likelihoods and tokens, an error rate from their errors and words. CIDEr is the mean of the examples' CIDEr, whose
n-gram weights come from the document frequencies of the whole split's references, as in pycocoevalcap. These stay
fixed: a resample represents other test examples, not another way of scoring them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from harness.core.formulas import Floats, counts_key, score
from harness.core.record import MetricInfo, Run, TrialRecord
from results.statistics.example_scores import Examples, read_many
from results.statistics.intervals import (
    RESAMPLES,
    Estimate,
    estimate,
    resample_weights,
)

SPLIT = "test"
_BATCH = 256  # trials resampled in one product: 60 MB
T = TypeVar("T")


def score_on_test(record: TrialRecord, metric: str) -> float | None:
    """The score on the test split; None where it was not measured."""
    return record.metrics.get(SPLIT, {}).get(metric)


def examples_of(run: Run, records: Sequence[TrialRecord], metrics: Sequence[MetricInfo]) -> Iterator[Examples | str]:
    """The test examples of each trial, or the reason why they cannot be read, in order."""
    paths = (run.trial_folder(record.trial_id) / "examples.parquet" for record in records)
    sources = [(path, record.metrics.get(SPLIT, {})) for path, record in zip(paths, records, strict=True)]
    return read_many(sources, {info.name: info for info in metrics})


@dataclass(frozen=True)
class _Trial:
    """The scores of one trial on resamples of its examples, and a number shared by trials with the same ids."""

    ids: int
    replicates_B: Mapping[str, Floats]  # by metric


class Clusters:
    """Which examples are drawn together.

    Args:
        names: of the cluster of each example (E).
    """

    def __init__(self, names: Sequence[str]) -> None:
        numbers: dict[str, int] = {}  # in the order of first occurrence
        number_E = np.array([numbers.setdefault(name, len(numbers)) for name in names])
        self.count = len(numbers)
        self._order_E = np.argsort(number_E, kind="stable")
        self._starts_G = np.searchsorted(number_E[self._order_E], np.arange(self.count))

    def sums(self, columns_E: Floats) -> Floats:
        """(…, G) sums over the examples of each cluster of (…, E); the same numbers where no example shares one."""
        if self.count == columns_E.shape[-1]:
            return columns_E
        sums: Floats = np.add.reduceat(columns_E[..., self._order_E], self._starts_G, axis=-1)
        return sums


class Resampled:
    """Scores of trials, and of the same trials on resampled examples.

    Args:
        records: finished trials of one setting.
        metrics: what to resample.
        examples: those of each trial, in the same order, as from ``examples_of``; further ones are not consumed.
    """

    def __init__(
        self,
        records: Sequence[TrialRecord],
        metrics: Sequence[MetricInfo],
        examples: Iterable[Examples | str],
    ) -> None:
        self.metrics = {info.name: info for info in metrics}
        self.unreadable: list[str] = []  # one message per file that could not be read
        self._ids: dict[tuple[str, ...], int] = {}
        self._trials: dict[str, _Trial] = {}
        self._clusters: dict[int, Clusters] = {}  # of the examples with this number
        alike: dict[tuple[int, tuple[str, ...]], dict[str, Examples]] = {}
        for record, found in zip(records, examples, strict=False):
            if isinstance(found, str):
                self.unreadable.append(f"{record.trial_id}: {found}")
            else:
                ids = self._ids.setdefault(found.ids, len(self._ids))
                alike.setdefault((ids, tuple(found.columns)), {})[record.trial_id] = found
                if found.clusters is not None:  # files of earlier versions have none, and are resampled like the others
                    self._clusters.setdefault(ids, Clusters(found.clusters))
        for (ids, names), trials in alike.items():
            clusters = self._clusters.setdefault(ids, Clusters(next(iter(trials.values())).ids))
            for part in _parts(list(trials.items()), _BATCH):
                if clusters.count > 1:  # a single one has no variance
                    self._resample(ids, names, dict(part))

    def _resample(self, ids: int, names: tuple[str, ...], trials: Mapping[str, Examples]) -> None:
        """Resample trials with the same examples and scores in one matrix product: many small ones take longer."""
        keys = {counts_key(self.metrics[name]): name for name in names}
        clusters = self._clusters[ids]
        columns_TKG = {
            key: clusters.sums(np.stack([one.columns[name].T for one in trials.values()])) for key, name in keys.items()
        }
        replicates_TB: dict[str, Floats] = {}
        if keys:
            joined_TKG = np.concatenate(list(columns_TKG.values()), axis=1)
            sums_TBK = _weighted(joined_TKG, resample_weights(clusters.count))
            ends = np.cumsum([columns.shape[1] for columns in columns_TKG.values()])
            sums = dict(zip(columns_TKG, np.split(sums_TBK, ends[:-1], axis=-1), strict=True))
            replicates_TB = {name: score(self.metrics[name], sums[counts_key(self.metrics[name])]) for name in names}
        for t, trial_id in enumerate(trials):
            self._trials[trial_id] = _Trial(ids, {name: replicates[t] for name, replicates in replicates_TB.items()})

    def _ids_of(self, record: TrialRecord) -> int:
        return self._trials[record.trial_id].ids

    def _examples(self, ids: int) -> int:
        return self._clusters[ids].count

    def replicates(self, records: Sequence[TrialRecord], metric: str) -> tuple[Floats, int] | None:
        """The mean over trials on each resample (B,), and the number of clusters; None if a trial lacks the score."""
        trials = [trial for record in records if (trial := self._trials.get(record.trial_id)) is not None]
        present = [trial.replicates_B[metric] for trial in trials if metric in trial.replicates_B]
        if not records or len(present) < len(records) or len({trial.ids for trial in trials}) > 1:
            return None
        return self._mean_of(records, metric), self._examples(trials[0].ids)

    def _mean_of(self, records: Sequence[TrialRecord], metric: str) -> Floats:
        present = [self._trials[record.trial_id].replicates_B[metric] for record in records]
        if self.metrics[metric].scale == "log":
            logarithms = [np.log(one) for one in present]
            return np.exp(sum(logarithms[1:], start=logarithms[0]) / len(present))
        found: Floats = sum(present[1:], start=present[0]) / len(present)
        return found

    def replicates_of_rows(self, rows: Sequence[Sequence[TrialRecord]], metric: str) -> tuple[Floats, int] | None:
        """Each row's mean over the trials that have the score (R, B), and the number of clusters; None without rows.

        NaN for a row that cannot be resampled, or whose examples differ from those of the first row: no pairing.
        """
        found = np.full((len(rows), RESAMPLES), np.nan)
        ids = None
        for index, records in enumerate(rows):
            scored = [record for record in records if score_on_test(record, metric) is not None]
            replicates = self.replicates(scored, metric)
            if replicates is None:
                continue
            own = self._ids_of(scored[0])
            ids = own if ids is None else ids
            if own == ids:
                found[index] = replicates[0]
        return None if ids is None else (found, self._examples(ids))

    def estimate(self, records: Sequence[TrialRecord], metric: str) -> Estimate | None:
        """Mean over the trials (one per seed) that have the score, with its interval."""
        scored = [(record, value) for record in records if (value := score_on_test(record, metric)) is not None]
        resampled = self.replicates([record for record, _ in scored], metric)
        return estimate([value for _, value in scored], *(resampled or (None, None)))


def _parts(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (whole[start : start + size] for start in range(0, len(whole), size))


def _weighted(columns_KG: Floats, weights_BG: NDArray[np.float32]) -> Floats:
    """(…, B, K) weighted sums over the clusters of (…, K, G), contiguous by column.

    In single precision, which is twice as fast: counts stay exact, other sums are accurate to 1e-6.
    """
    *shape, clusters = columns_KG.shape
    sums = columns_KG.reshape(-1, clusters).astype(np.float32) @ weights_BG.T
    found: Floats = np.swapaxes(sums.reshape(*shape, -1), -1, -2).astype(np.float64)
    return found
