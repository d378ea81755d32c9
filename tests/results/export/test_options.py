"""Columns of axes and options: their names are the keys of the experiment file, their types those of the values."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from harness.experiment.load import Experiment
from harness.experiment.plan import expand
from results.export.options import option_columns

GROUPING = {"image": "vision", "text": None}


def specs(**sections: Any) -> list[dict[str, Any]]:
    """Specs as records store them."""
    return [spec.model_dump(mode="json") for spec in expand(Experiment(**sections))]


def test_every_axis_is_a_column_and_null_where_a_method_has_no_such_option() -> None:
    columns = option_columns(
        specs(
            task={"name": "scenes", "train_examples": [64, 128]},
            backbone={"projector": ["linear", "mlp"]},
            adapters=[
                {
                    "method": "lora",
                    "rank": [2, 4],
                    "grouping": {"image": "vision", "text": None},
                    "learning_rate": 1e-3,
                },
                {"method": "full", "learning_rate": 1e-3, "tried_learning_rates": [1e-3, 3e-3]},
            ],
            budget={"examples": [16, 32]},
            optimizer={"weight_decay": 0.1},
        )
    )
    assert set(columns["task.train_examples"].to_pylist()) == {64, 128}
    assert set(columns["backbone.projector"].to_pylist()) == {"linear", "mlp"}
    assert set(columns["budget.examples"].to_pylist()) == {16, 32}
    assert set(columns["adapter.rank"].to_pylist()) == {2, 4, None}
    rank, context = columns["adapter.rank"].to_pylist(), columns["adapter.grouping.image"].to_pylist()
    assert [group for group, of in zip(context, rank, strict=True) if of] == ["vision"] * 16
    assert columns["adapter.grouping.text"].to_pylist() == [None] * len(rank)
    assert set(columns["adapter.tried_learning_rates"].to_pylist()) == {"[]", "[0.001, 0.003]"}
    types = {
        "task.train_examples": pa.int64(),
        "adapter.rank": pa.int64(),
        "adapter.dropout": pa.float64(),
        "adapter.use_rslora": pa.bool_(),
        "optimizer.bf16": pa.bool_(),
        "optimizer.weight_decay": pa.float64(),
        "backbone.revision": pa.string(),
        "fingerprints.language_model": pa.string(),
    }
    assert {name: columns[name].type for name in types} == types


def test_plugins_and_what_has_a_shorter_name_are_no_options() -> None:
    columns = option_columns(specs(task="scenes", adapters=[{"method": "ia3", "learning_rate": 0.1}]))
    assert not [name for name in columns if "plugin" in name or "metrics." in name or name.endswith("label")]
    assert {"adapter.method", "adapter.grouping_name", "optimizer.learning_rate", "seed"}.isdisjoint(columns)
    sections = list(dict.fromkeys(name.partition(".")[0] for name in columns))
    assert sections == ["task", "backbone", "adapter", "budget", "optimizer", "eval", "fingerprints"]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([64, "all"], pa.string(), ["64", "all"]),
        ([True, "pissa"], pa.string(), ["true", "pissa"]),
        (["AF", ["q", "v"]], pa.string(), ["AF", '["q", "v"]']),
        ([8, 0.5, None], pa.float64(), [8.0, 0.5, None]),
        ([True, 1], pa.string(), ["true", "1"]),
        ([2**70], pa.string(), [str(2**70)]),
    ],
)
def test_a_column_of_mixed_values_is_the_narrowest_type_that_keeps_them(
    values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    column = option_columns([{"adapter": {"config": {"x": value}}} for value in values])["adapter.x"]
    assert (column.type, column.to_pylist()) == (kind, expected)
