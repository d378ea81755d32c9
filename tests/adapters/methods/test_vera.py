"""VeRA: equal to Hugging Face PEFT's, its projections, its options. The equations themselves: test_layer_methods.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn

from adapters.attach import Adapters
from adapters.methods.ln_tuning import LNTuning
from adapters.methods.vera import VeRA, VeRAConfig
from adapters.placement.roles import Target
from adapters.placement.router import Router
from tests.support.adapters import adapt, embeds
from tests.support.models import tiny_llama, tiny_opt, with_biases
from tests.support.peft import MODULES, check_equal


@pytest.mark.parametrize("make_model", MODULES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_agnostic_equals_pefts_layers_in_forward_and_gradients(make_model: Any) -> None:
    """Float64. PEFT's projections have the same shapes and, from the same seed, the same numbers."""
    model, theirs = with_biases(make_model).double(), with_biases(make_model).double()
    adapters = adapt(model, VeRA(VeRAConfig(rank=40, d_initial=0.5)), "agnostic").double()
    config = VeraConfig(r=40, projection_prng_key=0, target_modules=MODULES[make_model])
    peft_model: Any = get_peft_model(theirs, config)
    for name in ("vera_A", "vera_B"):
        peft_projection = getattr(peft_model.base_model, name)["default"]
        our_projection = adapters.shared.get_buffer(f"vera.{name}")
        torch.testing.assert_close(our_projection.float(), peft_projection.float(), rtol=1e-6, atol=0)
        our_projection.copy_(peft_projection)
    pairs = []
    for name, parameter in adapters.named_parameters():
        _, path, _, _, _, _, kind = name.split(".")
        pairs.append((parameter, theirs.get_parameter(f"{path.replace('/', '.')}.{kind}.default")))
        pairs[-1][1].data = parameter.data.clone()
    check_equal(model, peft_model, theirs, pairs)


def test_the_projections_are_drawn_once_saved_once_and_never_trained() -> None:
    adapters = adapt(tiny_llama(), VeRA(VeRAConfig(rank=5)))
    shapes = {name: tuple(x.shape) for name, x in adapters.state_dict().items()}
    projections = {name: shape for name, shape in shapes.items() if "vera_A" in name or "vera_B" in name}
    # The widest input and output of all layers, the feed-forward ones' 48.
    assert projections == {"shared.vera.vera_A": (5, 48), "shared.vera.vera_B": (48, 5)}
    assert {name.rpartition(".")[2] for name, _ in adapters.named_parameters()} == {"vera_lambda_d", "vera_lambda_b"}
    outputs = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert adapters.parameters_by_group() == {"image": 14 * 5 + outputs, "text": 14 * 5 + outputs}


def test_groups_with_other_options_have_projections_of_their_own() -> None:
    methods = {"image": VeRA(VeRAConfig(rank=5)), "text": VeRA(VeRAConfig(rank=7))}
    shared = adapt(tiny_llama(), methods).shared
    assert {name: tuple(x.shape) for name, x in shared.named_buffers()} == {
        "vera.vera_A": (5, 48),
        "vera.vera_B": (48, 5),
        "vera_2.vera_A": (7, 48),
        "vera_2.vera_B": (48, 7),
    }


def test_a_deltas_projections_follow_when_the_adapters_are_cast() -> None:
    model = tiny_llama().double()
    adapters = adapt(model, VeRA(VeRAConfig(rank=5))).double()
    adapters.shared.get_buffer("vera.vera_A").zero_()  # no bias, so the update is gone with it
    found_BTV = model(inputs_embeds=embeds().double(), use_cache=False).logits
    adapters.detach()
    assert torch.equal(found_BTV, model(inputs_embeds=embeds().double(), use_cache=False).logits)


def test_it_starts_as_its_options_say() -> None:
    router = Router({"image": "image", "text": "text"})
    method = VeRA(VeRAConfig(rank=5, d_initial=0.3))
    adapters = Adapters(tiny_opt(), {"image": method, "text": method}, router, seed=0)
    for name, parameter in adapters.named_parameters():
        expected = 0.3 if name.endswith("vera_lambda_d") else 0.0
        assert torch.equal(parameter, torch.full_like(parameter, expected)), name


@pytest.mark.parametrize("layout", [[[0] * 40], [[0] * 20 + [1] * 20]], ids=["one group", "two groups"])
def test_dropout_acts_in_training_only(layout: list[list[int]]) -> None:
    """Some inputs are dropped, others doubled: every token of the same input has another output."""
    linear = nn.Linear(6, 4)
    method = VeRA(VeRAConfig(rank=16, dropout=0.5))
    target = Target("linear", "v", 6, 4, layer=linear)
    router = Router({"image": "image", "text": "text"})
    deltas = {group: method.delta(target, torch.Generator()) for group in router.groups}
    for parameter in (p for delta in deltas.values() for p in delta.parameters()):
        nn.init.ones_(parameter)
    generator = torch.Generator().manual_seed(0)
    change = method.change(target, deltas, method.shared([target], generator), generator)
    router.prepare_lookup(change.groups)
    router.set_context_ids(torch.tensor(layout))
    x_BTI = torch.ones(1, 40, 6)
    torch.manual_seed(0)
    dropped_BTO = change.train()(x_BTI, linear(x_BTI), router.layout)
    kept_BTO = change.eval()(x_BTI, linear(x_BTI), router.layout)
    assert dropped_BTO[0].unique(dim=0).shape[0] > 15
    torch.testing.assert_close(kept_BTO, kept_BTO[:, :1].expand_as(kept_BTO))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank\n.*greater than 0"),
        ({"d_initial": 0.0}, "d_initial\n.*greater than 0"),
        ({"dropout": 1.0}, "dropout\n.*less than 1"),
        ({"alpha": 8.0}, "alpha\n.*Extra inputs"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VeRAConfig(**options)


def test_labels() -> None:
    assert VeRA(VeRAConfig()).label() == "VeRA r=256"
    assert VeRA(VeRAConfig(rank=4, where="A")).label() == "VeRA r=4 A"
    assert LNTuning(LNTuning.Config()).label() == "LN-tuning"
