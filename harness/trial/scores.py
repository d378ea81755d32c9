"""Computes the scores of a trial, in a mixture separately for each task, and writes per-example scores to Parquet.

Paired statistics and the report's gallery are made from this file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from harness.check.returned import checked_scores
from harness.core.files import atomic
from harness.core.naming import metric_name
from harness.core.origin import during
from harness.core.registry import Plugin
from harness.model.budget import by_member
from harness.model.build import Splits
from harness.trial.evaluate import Likelihood
from tasks.base import Example, Metric, Scores
from tasks.clusters import clusters_of
from tasks.registry import METRICS

_log = logging.getLogger(__name__)


def warm_up(metrics: Mapping[str, Mapping[str, Plugin]]) -> None:
    """Let metrics start what they need later; what fails now fails again where it is needed, and is told then.

    Args:
        metrics: as for ``score_members``.
    """
    for plugin in (plugin for member in metrics.values() for plugin in member.values()):
        try:
            METRICS.load(plugin.target)().warm_up()
        except Exception as error:  # a plugin's
            _log.info("metric %s did not warm up: %s: %s", plugin.name, type(error).__name__, error)


def perplexities(examples: Sequence[Example], likelihood: Likelihood) -> dict[str, float]:
    """Perplexity over all examples, over the first reference of each, and over each task of a mixture."""
    found = {"perplexity": likelihood.perplexity, "perplexity_one_reference": likelihood.perplexity_one_reference}
    for member, indices in by_member(examples).items():
        if member:
            found[metric_name(member, "perplexity")] = likelihood.of(indices).perplexity
    return {name: value for name, value in found.items() if value is not None}


def score_members(
    metrics: Mapping[str, Mapping[str, Plugin]], examples: Sequence[Example], predictions: Mapping[str, str]
) -> Scores:
    """Score generated texts with the metrics of each example's task.

    Args:
        metrics: task in a mixture ("" for a single task) → metric → its plugin, as in ``TaskChoice``.
        examples: with their references.
        predictions: texts by example id.
    """
    corpus: dict[str, float] = {}
    per_example: dict[str, dict[str, float]] = {example.id: {} for example in examples}
    counts: dict[str, dict[str, tuple[float, ...]]] = {example.id: {} for example in examples}
    notes: dict[str, None] = {}
    for member, indices in by_member(examples).items():
        references = {examples[i].id: examples[i].references for i in indices}
        for plugin in metrics[member].values():
            metric: type[Metric] = METRICS.load(plugin.target)
            with during(f"metric {metric_name(member, plugin.name)}", of=metric):
                returned = metric().score({key: predictions[key] for key in references}, references)
                scores = checked_scores(returned, metric, references.keys())
            corpus |= {metric_name(member, name): value for name, value in scores.corpus.items()}
            for key, values in scores.per_example.items():
                per_example[key] |= {metric_name(member, name): value for name, value in values.items()}
            for key, of_example in scores.counts.items():
                counts[key] |= {metric_name(member, name): values for name, values in of_example.items()}
            notes |= dict.fromkeys(scores.notes)
    return Scores(corpus, per_example, tuple(notes), counts)


def write_examples(
    path: Path,
    splits: Splits,
    validation: Likelihood,
    test: Likelihood,
    wrong: Likelihood | None,
    predictions: dict[str, str],
    scores: Scores,
    previews: Mapping[str, Sequence[str | None]] = MappingProxyType({}),
) -> None:
    """Write one row per evaluated example.

    Columns: ``split``, ``example_id``, ``cluster`` (the id of the first example that shares its input), ``nll`` (nats,
    summed over references), ``tokens`` (likewise), ``nll_first`` and ``tokens_first`` (of the first reference); for the
    test split also ``nll_wrong_input``, ``prediction``, ``references`` (list), ``inputs`` (JSON: list of [context,
    "file" or "text", value]), one column per metric, and, for metrics whose corpus score is not a mean,
    ``<metric>.counts`` (list of doubles), from whose sums it is computed. Where there are ``previews``, their names by
    input (JSON), see ``harness/trial/previews.py``.
    Values that were not measured are null.
    """
    rows = _rows("validation", splits.validation, validation)
    for i, (row, example) in enumerate(zip(_rows("test", splits.test, test), splits.test, strict=True)):
        rows.append(
            {
                **row,
                "nll_wrong_input": None if wrong is None else wrong.nll[i],
                "prediction": predictions[example.id],
                "references": list(example.references),
                "inputs": json.dumps(
                    [[context, "file" if isinstance(v, Path) else "text", str(v)] for context, v in example.inputs]
                ),
                **({"previews": json.dumps(previews[example.id])} if example.id in previews else {}),
                **scores.per_example.get(example.id, {}),
                **{f"{name}.counts": np.asarray(c, float) for name, c in scores.counts.get(example.id, {}).items()},
            }
        )
    with atomic(path) as partial:
        pd.DataFrame(rows).to_parquet(partial, index=False)


def _rows(split: str, examples: Sequence[Example], likelihood: Likelihood) -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "example_id": example.id,
            "cluster": cluster,
            "nll": likelihood.nll[index],
            "tokens": likelihood.tokens[index],
            "nll_first": likelihood.first_nll[index],
            "tokens_first": likelihood.first_tokens[index],
        }
        for index, (example, cluster) in enumerate(zip(examples, clusters_of(examples), strict=True))
    ]
