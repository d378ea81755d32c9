"""LoRA's options: scaling, initialisation, dropout, dtypes, its limits.

Shapes: B rows, T positions, I and O input and output features of a layer, R rank.
"""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from adapters.attach import Adapters
from adapters.methods.lora import LoRA, LoRAConfig, LoRADelta
from adapters.placement.roles import Target
from adapters.placement.router import Router
from harness.core.contexts import Segment, resolve_grouping
from harness.core.errors import UserError
from tests.support.adapters import adapt, disturb, embeds
from tests.support.models import tiny_llama

STARTS = ("pissa", "olora")
INSIDE, OUTSIDE = 12, 8


def linear_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INSIDE, OUTSIDE).requires_grad_(False)


def delta_of(layer: nn.Linear | None = None, seed: int = 0, **options: Any) -> LoRADelta:
    layer = layer or linear_layer()
    target = Target("linear", "q", layer.in_features, layer.out_features, layer=layer)
    delta = LoRA(LoRAConfig(**{"rank": 3, **options})).delta(target, torch.Generator().manual_seed(seed))
    assert isinstance(delta, LoRADelta)
    return delta


def peft_of(layer: nn.Linear, **options: Any) -> Any:
    """peft's own layer around a copy of ours."""
    copied = nn.Linear(layer.in_features, layer.out_features)
    copied.load_state_dict(layer.state_dict())
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 3, "target_modules": ["linear"], **options})
    return peft.inject_adapter_in_model(config, nn.ModuleDict({"linear": copied}))["linear"]


# ── Scaling


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 6.0}, 2.0),
        ({"use_rslora": True}, math.sqrt(3)),
        ({"use_rslora": True, "alpha": 6.0}, 6 / math.sqrt(3)),
    ],
)
def test_the_scale_is_that_of_the_paper_and_of_peft(options: dict[str, Any], scale: float) -> None:
    layer = linear_layer()
    assert delta_of(layer, **options).scale == pytest.approx(scale, rel=1e-12)
    theirs = peft_of(layer, lora_alpha=options.get("alpha", 3), use_rslora=options.get("use_rslora", False))
    assert theirs.scaling["default"] == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 6.0, "use_rslora": True}, *({"init_lora_weights": s} for s in STARTS)]
)
def test_with_equal_weights_it_is_pefts_layer(options: dict[str, Any]) -> None:
    """Forward and gradients; 1e-5 as our base keeps its weight and peft's has lost a part of it to rounding."""
    layer = linear_layer()
    delta = delta_of(layer, **options)
    names = {"alpha": "lora_alpha"}
    theirs = peft_of(layer, **{names.get(name, name): value for name, value in options.items()})
    if "init_lora_weights" in options:  # the same start, up to the sign of each singular vector
        their_start = theirs.lora_B.default.weight @ theirs.lora_A.default.weight
        torch.testing.assert_close(delta.lora_B @ delta.lora_A, their_start, rtol=1e-5, atol=1e-5)
    disturb(delta.parameters())
    with torch.no_grad():
        theirs.lora_A.default.weight.copy_(delta.lora_A)
        theirs.lora_B.default.weight.copy_(delta.lora_B)
    x_BTI = torch.randn(2, 5, INSIDE)
    ours_BTO, theirs_BTO = delta(x_BTI, layer(x_BTI)), theirs(x_BTI)
    torch.testing.assert_close(ours_BTO, theirs_BTO, rtol=1e-5, atol=1e-5)
    ours_BTO.square().sum().backward()
    theirs_BTO.square().sum().backward()
    torch.testing.assert_close(delta.lora_A.grad, theirs.lora_A.default.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(delta.lora_B.grad, theirs.lora_B.default.weight.grad, rtol=1e-4, atol=1e-4)


# ── Initialisation


def test_by_default_A_is_drawn_as_linear_draws_its_weights_and_B_is_zero() -> None:  # noqa: N802
    delta = delta_of(seed=5)
    expected_RI = torch.empty(3, INSIDE)
    nn.init.kaiming_uniform_(expected_RI, a=math.sqrt(5), generator=torch.Generator().manual_seed(5))
    assert torch.equal(delta.lora_A, expected_RI)
    assert not delta.lora_B.any()


def test_gaussian_has_the_standard_deviation_of_peft() -> None:
    delta = delta_of(nn.Linear(4000, 16), rank=8, init_lora_weights="gaussian")
    assert delta.lora_A.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert delta.lora_A.abs().max() > 3 / 8  # not a uniform distribution
    assert not delta.lora_B.any()


@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_the_weight_is_a_part_of_it(start: Any) -> None:
    layer = linear_layer()
    delta = delta_of(layer, init_lora_weights=start, alpha=6.0)
    scale = 2.0 if start == "pissa" else 1.0  # OLoRA's pair is the decomposition itself, as in peft
    part_OI = scale * delta.lora_B @ delta.lora_A
    if start == "pissa":  # no part of rank 3 is nearer (Eckart-Young)
        rest = torch.linalg.svdvals(layer.weight)[3:].square().sum().sqrt()
        assert torch.linalg.matrix_norm(layer.weight - part_OI).item() == pytest.approx(rest.item(), rel=1e-4)
    else:  # an orthonormal basis of the first columns
        torch.testing.assert_close(part_OI[:, :3], layer.weight[:, :3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(delta.lora_B.T @ delta.lora_B, torch.eye(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [True, "gaussian", *STARTS])
@pytest.mark.parametrize("grouping", ["agnostic", "specific"])
def test_every_start_changes_nothing_bit_for_bit_and_leaves_the_base_alone(start: Any, grouping: Any) -> None:
    model = tiny_llama()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    router = Router(resolve_grouping(grouping, ("image", "text"))[0])
    router.set_layout([Segment(0, 5, "image"), Segment(5, 11, "text")])
    method = LoRA(LoRAConfig(rank=4, init_lora_weights=start))
    adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
    with torch.no_grad():
        bare_BTV = model(inputs_embeds=embeds(), use_cache=False).logits
        adapters.attach(model)
        assert torch.equal(model(inputs_embeds=embeds(), use_cache=False).logits, bare_BTV)
        disturb(adapters.parameters())
        assert not torch.allclose(model(inputs_embeds=embeds(), use_cache=False).logits, bare_BTV, atol=1e-2)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("start", STARTS)
def test_a_start_is_saved_and_is_no_trainable_parameter(start: Any) -> None:
    layer = linear_layer()
    delta = delta_of(layer, init_lora_weights=start)
    disturb(delta.parameters())
    assert sum(p.numel() for p in delta.parameters()) == 3 * (INSIDE + OUTSIDE)
    other = nn.Linear(INSIDE, OUTSIDE)
    again = delta_of(other, init_lora_weights=start)
    x_BTI, y_BTO = torch.randn(2, 5, INSIDE), torch.randn(2, 5, OUTSIDE)
    assert not torch.equal(again(x_BTI, y_BTO), delta(x_BTI, y_BTO))
    again.load_state_dict(delta.state_dict())
    assert torch.equal(again(x_BTI, y_BTO), delta(x_BTI, y_BTO))


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 6.0, "use_rslora": True}, *({"init_lora_weights": s} for s in STARTS)]
)
def test_merged_it_is_one_linear_layer(options: dict[str, Any]) -> None:
    layer = linear_layer()
    delta = delta_of(layer, **options)
    disturb(delta.parameters())
    x_BTI = torch.randn(2, 5, INSIDE)
    weight_OI, bias_O = delta.merge(layer.weight, layer.bias)
    torch.testing.assert_close(nn.functional.linear(x_BTI, weight_OI, bias_O), delta(x_BTI, layer(x_BTI)))


# ── In a model


@pytest.mark.parametrize("ids", [[[0] * 40 + [1] * 160], [[0, 1] * 100]], ids=["spans", "interleaved"])
def test_dropout_of_the_input_in_training_only_at_each_groups_own_tokens(ids: list[list[int]]) -> None:
    """Of an input of ones, a token's 6 numbers become 0 or 2: its update is one of 64."""
    router = Router({"image": "image", "text": "text"})
    router.set_context_ids(torch.tensor(ids))
    target = Target("linear", "q", 6, 4)
    method = LoRA(LoRAConfig(rank=2, dropout=0.5))
    deltas = {group: method.delta(target, torch.Generator().manual_seed(0)) for group in router.groups}
    change = method.change(target, deltas, None, torch.Generator())
    disturb(change.parameters())
    x_BTI, y_BTO = torch.ones(1, 200, 6), torch.zeros(1, 200, 4)
    quiet_BTO = change.eval()(x_BTI, y_BTO, router.layout)
    torch.manual_seed(0)
    loud_BTO, again_BTO = (change.train()(x_BTI, y_BTO, router.layout) for _ in range(2))
    assert not torch.equal(loud_BTO, again_BTO)
    inputs = torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6)
    for index, group in enumerate(router.groups):
        delta, mine_T = change.delta(group), torch.tensor(ids[0]) == index
        torch.testing.assert_close(quiet_BTO[0, mine_T], (x_BTI @ delta.lora_A.T @ delta.lora_B.T)[0, mine_T])
        possible = inputs @ delta.lora_A.T @ delta.lora_B.T
        distances = (loud_BTO[0, mine_T][:, None] - possible).abs().amax(dim=-1)
        assert distances.min(dim=1).values.max() < 1e-5
        assert distances.argmin(dim=1).unique().numel() > 20


def test_fp32_adapters_train_on_a_bf16_base() -> None:
    model = tiny_llama().bfloat16()
    adapters = adapt(model, LoRA(LoRAConfig(rank=3)))
    loss = model(inputs_embeds=embeds().bfloat16(), use_cache=False).logits.float().square().mean()
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in adapters.parameters())  # type: ignore[union-attr]


# ── Limits


@pytest.mark.parametrize(("rank", "allowed"), [(9, False), (8, True), (1, True)])
def test_a_rank_larger_than_the_layer_is_refused(rank: int, allowed: bool) -> None:
    if allowed:
        assert delta_of(rank=rank).lora_A.shape == (rank, INSIDE)
        return
    message = r"rank 9 is larger than layer linear \(q\), which has 12 inputs and 8 outputs; allowed: 1 to 8"
    with pytest.raises(UserError, match=message):
        delta_of(rank=rank)


@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_a_weight_that_cannot_be_read_is_refused(start: Any) -> None:
    layer = linear_layer()
    layer.weight = nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"layer linear \(Linear\) has no weight matrix that can be read"):
        delta_of(layer, init_lora_weights=start)


@pytest.mark.parametrize("start", STARTS)
def test_dropout_of_a_part_of_the_weight_is_refused(start: Any) -> None:
    with pytest.raises(ValidationError, match=f"dropout must be 0 with init_lora_weights: {start}.*found 0.1"):
        LoRAConfig(dropout=0.1, init_lora_weights=start)


@pytest.mark.parametrize("value", [False, "orthogonal", "eva", "kaiming"])
def test_other_initialisations_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"init_lora_weights\n.*True, 'gaussian', 'pissa' or 'olora'"):
        LoRAConfig(init_lora_weights=value)


def test_labels_tell_what_is_not_plain_lora() -> None:
    assert LoRA(LoRAConfig(rank=4)).label() == "LoRA r=4"
    assert (
        LoRA(LoRAConfig(rank=4, use_rslora=True, init_lora_weights="pissa", where="A")).label() == "rsLoRA r=4 pissa A"
    )
