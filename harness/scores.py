"""Per-example scores of a trial, one Parquet file: what paired statistics and the report's gallery are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from harness.build import Splits
from harness.evaluate import Likelihood
from tasks.base import Scores


def write_examples(
    path: Path,
    splits: Splits,
    validation: Likelihood,
    test: Likelihood,
    wrong: Likelihood | None,
    predictions: dict[str, str],
    scores: Scores,
) -> None:
    """Write one row per evaluated example.

    Columns: ``split``, ``example_id``, ``nll`` (nats, summed over references), ``tokens`` (likewise); for the test
    split also ``nll_wrong_input``, ``prediction``, ``references`` (list), ``inputs`` (JSON: context → file), and one
    column per metric. What was not measured is null.
    """
    rows: list[dict[str, Any]] = []
    for i, example in enumerate(splits.validation):
        rows.append(
            {"split": "validation", "example_id": example.id, "nll": validation.nll[i], "tokens": validation.tokens[i]}
        )
    for i, example in enumerate(splits.test):
        rows.append(
            {
                "split": "test",
                "example_id": example.id,
                "nll": test.nll[i],
                "tokens": test.tokens[i],
                "nll_wrong_input": None if wrong is None else wrong.nll[i],
                "prediction": predictions[example.id],
                "references": list(example.references),
                "inputs": json.dumps({context: str(file) for context, file in example.inputs.items()}),
                **scores.per_example.get(example.id, {}),
            }
        )
    partial = path.with_name(f".{path.name}.partial")
    pd.DataFrame(rows).to_parquet(partial, index=False)
    partial.replace(path)
