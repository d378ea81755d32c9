"""The test examples of a trial as columns of numbers, from whose sums its scores are computed (``formulas.py``).

A score that its columns do not reproduce is not resampled over examples. Shapes: E examples, K columns of a score.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from joblib import Parallel, cpu_count, delayed
from numpy.typing import NDArray

from harness.core.formulas import PERPLEXITIES, WIDTHS, Floats, agree, base_name, counts_key, formula, score
from harness.core.parquet import bounded
from harness.core.record import MetricInfo

_WORTH_PROCESSES = 1000  # files; starting processes takes as long as reading about this many
_PART = 100  # files read by one process at a time
Source = tuple[Path, Mapping[str, float]]  # a trial's examples.parquet, and its recorded test scores


class Examples:
    """The test examples of one trial: their sorted ids, and by metric the columns that its score is computed from.

    ``clusters`` are names shared by examples that share an input (``tasks/clusters.py``); None: the file is from an
    earlier version, and nothing is known.
    """

    def __init__(
        self, ids: tuple[str, ...], columns: Mapping[str, Floats], clusters: tuple[str, ...] | None = None
    ) -> None:
        self.ids, self.columns, self.clusters = ids, columns, clusters  # columns: metric → (E, K)


def read_many(sources: Sequence[Source], metrics: Mapping[str, MetricInfo]) -> Iterator[Examples | str]:
    """The result of ``read_examples`` for each trial in order, or the reason why its file cannot be read.

    Many files are read by worker processes, ahead of the consumer.
    """
    parts = [sources[start : start + _PART] for start in range(0, len(sources), _PART)]
    processes = 1 if len(sources) < _WORTH_PROCESSES else min(4, cpu_count())
    if processes == 1:
        for part in parts:
            yield from _read_part(part, metrics)
        return
    read = Parallel(processes, return_as="generator", batch_size=1, pre_dispatch="all")
    for packed in read(delayed(_read_packed)(part, metrics) for part in parts):
        yield from pickle.loads(packed)  # noqa: S301 -- from our own worker


def _read_packed(sources: Sequence[Source], metrics: Mapping[str, MetricInfo]) -> bytes:
    """Pickled here: joblib's own pickler takes as long for many small arrays as reading their files."""
    return pickle.dumps(_read_part(sources, metrics), protocol=pickle.HIGHEST_PROTOCOL)


def _read_part(sources: Sequence[Source], metrics: Mapping[str, MetricInfo]) -> list[Examples | str]:
    """Trials with the same examples share their ids: the pickle has them once."""
    found: list[Examples | str] = []
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    for path, scores in sources:
        try:
            with bounded(path):
                one = read_examples(path, metrics, scores)
        except (OSError, pa.ArrowException) as error:
            found.append(str(error).splitlines()[0])
            continue
        one.ids = shared.setdefault(one.ids, one.ids)
        if one.clusters is not None:
            one.clusters = shared.setdefault(one.clusters, one.clusters)
        found.append(one)
    return found


def read_examples(path: Path, metrics: Mapping[str, MetricInfo], scores: Mapping[str, float]) -> Examples:
    """Read the columns of the metrics whose recorded score they reproduce.

    Args:
        path: a trial's examples.parquet.
        metrics: by name.
        scores: recorded scores on the test split, by name.

    Raises:
        OSError, pyarrow.ArrowException: the file cannot be read.
    """
    with pq.ParquetFile(pa.BufferReader(path.read_bytes())) as file:
        known = set(file.schema_arrow.names)
        wanted = {name: _columns_of(info) for name, info in metrics.items() if name in scores}
        wanted = {name: columns for name, columns in wanted.items() if known.issuperset(columns)}
        needed = dict.fromkeys(column for columns in wanted.values() for column in columns)
        named = ["cluster"] if "cluster" in known else []
        table = file.read(columns=["split", "example_id", *named, *needed], use_threads=False)
    rows = np.flatnonzero(table.column("split").to_numpy() == "test")
    ids = table.column("example_id").to_numpy()[rows].astype(str)
    order = np.argsort(ids, kind="stable")
    rows, ids = rows[order], ids[order]
    read = {column: _numbers(table.column(column), rows) for column in needed}
    found = {}
    for name, columns in wanted.items():
        values_EK = _values(metrics[name], [read[column] for column in columns], ids)
        if not len(rows) or values_EK.shape[1] != WIDTHS[formula(metrics[name])]:
            continue
        if agree(float(score(metrics[name], values_EK.sum(axis=0))), scores[name]):
            found[name] = values_EK
    clusters = tuple(table.column("cluster").to_numpy()[rows].astype(str).tolist()) if named else None
    return Examples(tuple(ids.tolist()), found, clusters)


def _columns_of(metric: MetricInfo) -> tuple[str, ...]:
    kind = formula(metric)
    if kind == "perplexity":
        return PERPLEXITIES[base_name(metric.name)]
    return (metric.name,) if kind == "mean" else (f"{counts_key(metric)}.counts",)


def _values(metric: MetricInfo, columns: list[Floats], ids: NDArray[np.str_]) -> Floats:
    """(E, K); an example without a value contributes nothing to any sum."""
    values_EK = np.concatenate(columns, axis=1)
    present_EK = np.isfinite(values_EK)
    if formula(metric) == "mean":
        values_EK, present_EK = np.concatenate([values_EK, present_EK], axis=1), np.repeat(present_EK, 2, axis=1)
    elif formula(metric) == "perplexity" and (member := metric.name.rpartition("/")[0]):
        present_EK &= np.char.startswith(ids, f"{member}/")[:, None]
    return np.where(present_EK, values_EK, 0.0)


def _numbers(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> Floats:
    """(E, K), NaN for null. K is 1 for numbers, the length for lists, or 0 if the lists differ in length."""
    array = column.combine_chunks()
    if not pa.types.is_list(array.type):
        numbers: Floats = array.to_numpy(zero_copy_only=False).astype(float)
        return numbers[rows, None]
    lengths = np.diff(array.offsets.to_numpy())
    there = lengths > 0
    width = int(lengths.max(initial=0))
    if np.any(lengths[there] != width):
        return np.empty((len(rows), 0))
    values = np.full((len(array), width), np.nan)
    values[there] = array.flatten().to_numpy().reshape(-1, width)
    return values[rows]
