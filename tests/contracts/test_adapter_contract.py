"""What every registered adapter method promises: a new plugin gets these checks by registering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from adapters.attach import count_trainable
from adapters.registry import ADAPTERS
from harness.core.contexts import resolve_grouping
from harness.core.registry import Entry, Plugin
from harness.core.weight_decay import parameter_groups
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import AdapterChoice, Backbone, Budget, Evaluation, Optimizer, TaskChoice
from harness.model.build import assemble
from tests.support.adapters import disturb
from tests.support.registered import CONTEXTS, adapters_of, built_in, drawn_llama, every_method, method_of

pytestmark = pytest.mark.quick

LENGTH = 9

GROUPINGS = {"agnostic": "agnostic", "specific": "specific", "text alone": {"image": None, "text": "language"}}
# Whatever a plugin registers is checked with each grouping, a built-in method in the fast tests with two of the three.
every_method_and_grouping = pytest.mark.parametrize(
    ("entry", "grouping"),
    [
        pytest.param(
            entry,
            grouping,
            id=f"{name}-{grouping_name}",
            marks=[pytest.mark.slow] if built_in(entry) and (number + place) % 3 == 2 else [],
        )
        for number, (name, entry) in enumerate(ADAPTERS.entries().items())
        for place, (grouping_name, grouping) in enumerate(GROUPINGS.items())
    ],
)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    embeds_BTD = torch.randn(3, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    logits_BTV: Tensor = model(inputs_embeds=embeds_BTD, use_cache=False).logits
    return logits_BTV


@every_method
def test_it_says_what_it_is(entry: Entry) -> None:
    method = method_of(entry)
    assert method.label().strip()
    assert "\n" not in method.label()
    assert method.summary.strip()
    assert "\n" not in method.summary


@every_method
def test_its_options_refuse_unknown_keys_and_cannot_be_changed(entry: Entry) -> None:
    config_class = ADAPTERS.load(entry.target).Config
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        config_class(no_such_option=1)
    with pytest.raises(ValidationError, match="frozen"):
        config_class().anything = 1


@every_method_and_grouping
def test_at_initialisation_it_is_the_identity_bit_for_bit(entry: Entry, grouping: Any) -> None:
    """Or declares that it is not (soft prompts, a different attention)."""
    model = drawn_llama()
    bare = logits(model)
    adapters_of(entry, model, grouping).attach(model)
    assert torch.equal(logits(model), bare) is method_of(entry).identity_at_start


@every_method_and_grouping
@torch.no_grad()
def test_weight_decay_without_a_gradient_keeps_the_identity(entry: Entry, grouping: Any) -> None:
    """As for a group without a token: what decays towards zero is the identity there, or is exempt."""
    if not method_of(entry).identity_at_start:
        pytest.skip("it is not the identity at its start either")
    model = drawn_llama()
    bare = logits(model)
    adapters = adapters_of(entry, model, grouping)
    adapters.attach(model)
    groups = parameter_groups(adapters, 0.5)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in adapters.parameters())
    for group in groups:
        for p in group["params"]:
            p.mul_(1 - group["weight_decay"])
    torch.testing.assert_close(logits(model), bare, rtol=1e-5, atol=1e-5)


@every_method_and_grouping
def test_it_counts_its_parameters_without_building_them(entry: Entry, grouping: Any) -> None:
    with torch.device("meta"):
        empty = adapters_of(entry, drawn_llama(), grouping)
    adapters = adapters_of(entry, drawn_llama(), grouping)
    assert adapters.parameters_by_group() == empty.parameters_by_group()
    total = count_trainable(adapters)
    assert total == count_trainable(empty) == sum(adapters.parameters_by_role().values())
    # Groups are equal, and what they share is counted once.
    assert len(set(adapters.parameters_by_group().values())) <= 1
    assert sum(adapters.parameters_by_group().values()) <= total
    assert total > 0 or not method_of(entry).grouped


@every_method
def test_its_initialisation_depends_on_the_seed_alone(entry: Entry) -> None:
    model = drawn_llama()
    first = adapters_of(entry, model, "specific", seed=5).state_dict()
    torch.manual_seed(99)
    again = adapters_of(entry, model, "specific", seed=5).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_method_and_grouping
def test_attached_it_changes_the_output_and_detached_it_leaves_no_trace(entry: Entry, grouping: Any) -> None:
    model = drawn_llama()
    bare, weights = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    adapters = adapters_of(entry, model, grouping)
    adapters.attach(model)
    disturb(adapters.parameters(), scale=1.0)
    if method_of(entry).grouped:
        assert not torch.equal(logits(model), bare)
    adapters.detach()
    assert torch.equal(logits(model), bare)
    assert not [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


ANY = Plugin(name="any", distribution="any", result_version=1, target="any:Any")


def spec_of(entry: Entry) -> TrialSpec:
    method = method_of(entry)
    grouping, name = resolve_grouping("specific", CONTEXTS)
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
