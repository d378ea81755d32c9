"""What every registered adapter method promises: a new plugin gets these checks by registering."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.attach import Adapters, count_trainable
from adapters.base import AdapterMethod
from adapters.registry import ADAPTERS
from adapters.router import Router
from harness.build import assemble
from harness.contexts import Segment, resolve_grouping
from harness.plan import TrialSpec
from harness.registry import Entry, Plugin
from harness.sections import AdapterChoice, Backbone, Budget, Evaluation, Optimizer, TaskChoice

CONTEXTS = ("image", "text")
LAYOUT = (Segment(0, 1, "text"), Segment(1, 5, "image"), Segment(5, 9, "text"))
LENGTH = 9

every_method = pytest.mark.parametrize("entry", ADAPTERS.entries().values(), ids=ADAPTERS.entries())
every_grouping = pytest.mark.parametrize(
    "grouping", ["agnostic", "specific", {"image": None, "text": "language"}], ids=str
)


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def method_of(entry: Entry) -> AdapterMethod:
    method_class = ADAPTERS.load(entry.target)
    method: AdapterMethod = method_class(method_class.Config())
    return method


def adapters_of(entry: Entry, model: Any, grouping: Any, seed: int = 0) -> Adapters:
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    router.set_layout(LAYOUT)
    method = method_of(entry)
    return Adapters(model, dict.fromkeys(router.groups, method), router, seed, None if method.grouped else method)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    embeds_BTD = torch.randn(3, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    logits_BTV: Tensor = model(inputs_embeds=embeds_BTD, use_cache=False).logits
    return logits_BTV


def disturb(adapters: Adapters, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


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


@every_method
@every_grouping
def test_at_initialisation_it_is_the_identity_bit_for_bit(entry: Entry, grouping: Any) -> None:
    """Or says that it is not (soft prompts, another attention)."""
    model = tiny_llama()
    bare = logits(model)
    adapters_of(entry, model, grouping).attach(model)
    assert torch.equal(logits(model), bare) is method_of(entry).identity_at_start


@every_method
@every_grouping
def test_it_counts_its_parameters_without_building_them(entry: Entry, grouping: Any) -> None:
    with torch.device("meta"):
        empty = adapters_of(entry, tiny_llama(), grouping)
    adapters = adapters_of(entry, tiny_llama(), grouping)
    assert adapters.parameters_by_group() == empty.parameters_by_group()
    total = count_trainable(adapters)
    assert total == count_trainable(empty) == sum(adapters.parameters_by_role().values())
    # Groups are equal, and what they share is counted once.
    assert len(set(adapters.parameters_by_group().values())) <= 1
    assert sum(adapters.parameters_by_group().values()) <= total
    assert total > 0 or not method_of(entry).grouped


@every_method
def test_its_initialisation_depends_on_the_seed_alone(entry: Entry) -> None:
    model = tiny_llama()
    first = adapters_of(entry, model, "specific", seed=5).state_dict()
    torch.manual_seed(99)
    again = adapters_of(entry, model, "specific", seed=5).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_method
@every_grouping
def test_attached_it_changes_the_output_and_detached_it_leaves_no_trace(entry: Entry, grouping: Any) -> None:
    model = tiny_llama()
    bare, weights = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    adapters = adapters_of(entry, model, grouping)
    adapters.attach(model)
    disturb(adapters)
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
    """The projector always, the adapters' parameters, and of the base what the method says."""
    model = assemble(spec_of(entry), tiny_llama(), {"image": 20})
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
        assemble(spec_of(entry), tiny_llama(), {"image": 20}).projectors.state_dict()
        for entry in ADAPTERS.entries().values()
    ]
    assert len(starts) > 1
    assert all(torch.equal(start[name], starts[0][name]) for start in starts[1:] for name in starts[0])
