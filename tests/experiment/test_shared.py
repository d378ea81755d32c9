"""What trials share is computed once, and ids are those of the whole specs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.registry import identity
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.experiment.shared import distinct, sections_of, shared_dump, with_rate

pytestmark = pytest.mark.quick

Write = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
GRID = """\
task: scenes
adapters:
  - {method: lora, rank: [2, 4], learning_rate: [1e-3, 3e-3], grouping: [agnostic, specific]}
  - {method: bitfit, learning_rate: [1e-3, 3e-3]}
budget: {examples: [64, 128], epochs: 2}
seeds: [0, 1, 2]
"""


def id_of_whole(spec: TrialSpec) -> str:
    """The id as it was defined before specs shared anything."""
    content = spec.model_dump(
        mode="json",
        exclude={
            "adapter": {
                "label": True,
                "grouping_name": True,
                "learning_rate": True,
                "tried_learning_rates": True,
                "init_from": {"__all__": {"trial"}},
            },
            "eval": {"primary_metric", "equivalence_margin"},
            "relative_to": True,
        },
    )
    return hashlib.sha256(json.dumps(identity(content), sort_keys=True).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", ["budgets", "quickstart", "mixture", "coco"])
def test_ids_are_the_hashes_of_whole_specs(name: str) -> None:
    specs = expand(Experiment.from_yaml(ROOT / "experiments" / f"{name}.yaml"))
    assert [spec.trial_id for spec in specs] == [id_of_whole(spec) for spec in specs]


def test_ids_are_the_same_in_any_order_and_after_a_change(experiment_file: Write) -> None:
    specs = expand(Experiment.from_yaml(experiment_file(GRID)))
    mixed = [specs[i] for i in (0, 30, 1, 7, 31, 0)]
    changed = [
        specs[0].model_copy(update={"seed": 2**31}),
        specs[0].model_copy(update={"fingerprints": {"language_model": "sha256:0"}}),
        specs[0].model_copy(update={"budget": specs[-1].budget}),
        TrialSpec.model_validate_json(specs[5].model_dump_json()),
    ]
    for spec in (*mixed, *changed):
        assert spec.trial_id == id_of_whole(spec)
    assert len({spec.trial_id for spec in (specs[0], *changed[:3])}) == 4


def test_trials_share_their_sections(experiment_file: Write) -> None:
    specs = expand(Experiment.from_yaml(experiment_file(GRID)))
    assert len(specs) == 2 * 10 * 3
    assert len({id(spec.optimizer) for spec in specs}) == 2  # one for each learning rate
    assert len({sections_of(spec) for spec in specs}) == 20
    assert all(shared_dump(spec) == spec.model_dump(mode="json") for spec in specs)
    first = specs[0].optimizer
    assert with_rate(first, 0.5) is with_rate(first, 0.5)
    assert (with_rate(first, 0.5).learning_rate, first.learning_rate) == (0.5, 1e-3)


def test_distinct_trials_are_the_first_of_each_kind(experiment_file: Write) -> None:
    specs = expand(Experiment.from_yaml(experiment_file(GRID)))
    again = [TrialSpec.model_validate_json(spec.model_dump_json()) for spec in specs]  # they share no objects
    for given in (specs, again):
        found = distinct(given, "adapter")
        assert [(s.adapter.label, s.adapter.grouping_name) for s in found] == [
            ("LoRA r=2", "agnostic"), ("LoRA r=2", "specific"), ("LoRA r=4", "agnostic"), ("LoRA r=4", "specific"),
            ("BitFit", "agnostic"),
        ]  # fmt: skip
        assert [spec.seed for spec in distinct(given, "seed")] == [0, 1, 2]
        assert [(s.budget.examples, s.seed) for s in distinct(given, "budget", "seed")] == [
            (examples, seed) for examples in (64, 128) for seed in (0, 1, 2)
        ]
