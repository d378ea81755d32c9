"""What is trained in a trial, for every registered adapter method."""

from __future__ import annotations

import pytest
import torch

from adapters.registry import ADAPTERS
from harness.core.contexts import resolve_grouping
from harness.core.registry import Entry, Plugin
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import AdapterChoice, Backbone, Budget, Evaluation, Optimizer, TaskChoice
from harness.model.build import assemble
from tests.support.registered import CONTEXTS, drawn_llama, every_method, method_of

pytestmark = pytest.mark.quick

ANY = Plugin(name="any", distribution="any", result_version=1, target="any:Any")


def spec_of(entry: Entry) -> TrialSpec:
    method = method_of(entry)
    grouping, name, _ = resolve_grouping("specific", CONTEXTS)
    return TrialSpec(
        task=TaskChoice(name="any", plugin=ANY, contexts=CONTEXTS, modalities={}, metrics={}, config={}),
        backbone=Backbone(),
        adapter=AdapterChoice(
            method=entry.name, plugins=ADAPTERS.plugins(entry.name),
            grouping=grouping if method.grouped else dict.fromkeys(CONTEXTS), grouping_name=name,
            config=method.config.model_dump(), label=method.label(),
        ),
        budget=Budget(), optimizer=Optimizer(learning_rate=1e-3), eval=Evaluation(), seed=3,
    )  # fmt: skip


@every_method
def test_what_is_trained_in_a_trial(entry: Entry) -> None:
    """The projector always, the adapters' parameters, and the base parameters that the method names."""
    model = assemble(spec_of(entry), drawn_llama(), {"image": 20})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {id(p) for p in method_of(entry).trained(model.language_model)}
    base = {name for name, p in model.language_model.named_parameters() if id(p) in wanted}
    assert {name for name in trained if name.startswith("language_model.")} == {f"language_model.{n}" for n in base}
    assert {name for name in trained if name.startswith("projectors.")} == {
        "projectors.image.layers.1.weight",
        "projectors.image.layers.1.bias",
    }
    if method_of(entry).grouped:
        assert all(any(f"group_{context}." in name for name in trained) for context in CONTEXTS)


def test_the_projector_starts_the_same_for_every_method_of_a_seed() -> None:
    starts = [
        assemble(spec_of(entry), drawn_llama(), {"image": 20}).projectors.state_dict()
        for entry in ADAPTERS.entries().values()
    ]
    assert len(starts) > 1
    assert all(torch.equal(start[name], starts[0][name]) for start in starts[1:] for name in starts[0])
