"""The trials of one setting on resampled test examples, for intervals over examples and paired tests.

Axes: B resamples or permutations, E examples, G clusters of examples, K columns of a score
(``results/statistics/example_scores.py``), R rows. Every trial has the same resamples, so differences between trials
are paired by example.

Examples that share an input (questions about one picture) are drawn and exchanged together: what varies between test
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
    Difference,
    Estimate,
    estimate,
    p_value,
    p_values,
    resample_weights,
    swaps,
)

SPLIT = "test"
_BATCH = 256  # trials resampled in one product: 60 MB
Pairs = Sequence[tuple[TrialRecord, TrialRecord]]
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
    """The examples of one trial, its scores on their resamples, and a number shared by trials with the same ids."""

    ids: int
    columns_KG: Mapping[str, Floats]  # by key of the counts, which bleu_1 to bleu_4 share
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
            self._trials[trial_id] = _Trial(
                ids,
                {key: columns[t] for key, columns in columns_TKG.items()},
                {name: replicates[t] for name, replicates in replicates_TB.items()},
            )

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

    def differences(self, rows: Sequence[Pairs]) -> list[dict[str, Difference]]:
        """By row and metric the mean difference (one - other) over pairs, one per seed; p-values are uncorrected."""
        found: list[dict[str, Difference]] = [{} for _ in rows]
        sums: _Sums = {}
        for name in self.metrics:
            batches: dict[tuple[int, int], list[tuple[int, Pairs]]] = {}
            scored: Pairs
            for index, row in enumerate(rows):
                scored = [
                    pair for pair in row if None not in (score_on_test(pair[0], name), score_on_test(pair[1], name))
                ]
                if not scored:
                    continue
                if (ids := self._shared_ids(scored, name)) is not None:
                    batches.setdefault((ids, len(scored)), []).append((index, scored))
                else:
                    whole = self._whole(scored, name, False)
                    p_alone = p_value(whole.mean, whole.seed_se, whole.n, None)
                    found[index][name] = Difference(**vars(whole), p_value=p_alone)
            for batch in (part for whole in batches.values() for part in _parts(whole, _BATCH // 4)):
                wholes = [self._whole(pairs, name, True) for _, pairs in batch]
                nulls_RB = self._nulls([pairs for _, pairs in batch], name, sums)
                for (index, _), whole, p in zip(batch, wholes, _p_values(wholes, nulls_RB), strict=True):
                    found[index][name] = Difference(**vars(whole), p_value=p)
        return found

    def _shared_ids(self, pairs: Pairs, metric: str) -> int | None:
        """The number of the examples on which all trials of the pairs have the score; None if they differ."""
        trials = [self._trials.get(record.trial_id) for pair in pairs for record in pair]
        ids = {trial.ids if trial is not None and metric in trial.replicates_B else None for trial in trials}
        return ids.pop() if len(ids) == 1 else None

    def _whole(self, pairs: Pairs, metric: str, resampled: bool) -> Estimate:
        """The mean difference with its interval, over pairs that have the score."""
        scores = [one.metrics[SPLIT][metric] - other.metrics[SPLIT][metric] for one, other in pairs]
        if resampled:
            one_B, other_B = (self._mean_of([pair[side] for pair in pairs], metric) for side in (0, 1))
            whole = estimate(scores, one_B - other_B, self._examples(self._ids_of(pairs[0][0])))
        else:
            whole = estimate(scores)
        assert whole is not None  # noqa: S101 -- there is a pair
        return whole

    def _nulls(self, rows: Sequence[Pairs], metric: str, sums: _Sums) -> Floats:
        """(R, B) Each row's mean difference in each permutation, in which two trials exchange some examples."""
        columns = counts_key(self.metrics[metric])
        key = (columns, tuple(one.trial_id for pairs in rows for one, _ in pairs))
        if key not in sums:
            one_RSKG, other_RSKG = (
                np.array([[self._trials[pair[side].trial_id].columns_KG[columns] for pair in pairs] for pairs in rows])
                for side in (0, 1)
            )
            moved_RSBK = _weighted(other_RSKG - one_RSKG, swaps(one_RSKG.shape[-1]))
            one_RSK, other_RSK = one_RSKG.sum(axis=-1)[:, :, None], other_RSKG.sum(axis=-1)[:, :, None]
            sums[key] = (one_RSK + moved_RSBK, other_RSK - moved_RSBK)
        one_RSBK, other_RSBK = sums[key]
        info = self.metrics[metric]
        mean_RB: Floats = (score(info, one_RSBK) - score(info, other_RSBK)).mean(axis=1)
        return mean_RB


# Sums of both sides' columns after the exchange, by columns and trials; bleu_1 to bleu_4 share theirs.
_Sums = dict[tuple[str, tuple[str, ...]], tuple[Floats, Floats]]


def _p_values(wholes: Sequence[Estimate], null_RB: Floats) -> Sequence[float | None]:
    """p-values of differences that all have the same number of seeds; None for one seed."""
    if wholes[0].n < 2:
        return [None] * len(wholes)
    mean_R, seed_se_R = np.array([(whole.mean, whole.seed_se) for whole in wholes], float).T
    return p_values(mean_R, seed_se_R, wholes[0].n, null_RB)


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
