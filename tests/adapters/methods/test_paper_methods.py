"""Adapters are exactly what Context-PEFT defines: against arithmetic, float64 references and the base model itself.

Shapes: B rows, T positions, D width, I and O input and output features of a linear layer, G groups (0: no adapter).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.attach import AdaptedLayer
from adapters.base import AdapterMethod
from adapters.methods.bitfit import BitFitConfig
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement import roles
from adapters.placement.router import Router
from harness.core.contexts import Segment, resolve_grouping
from harness.core.errors import UserError
from tests.support.adapters import BITFIT, GROUPINGS, LORA, METHODS, adapt, disturb, each_method, embeds
from tests.support.models import MODELS, each_model, tiny_llama, tiny_opt
from tests.support.tiers import pairwise

pytestmark = pytest.mark.quick

# ── Algorithm 1, in float64: every group's change of every token, chosen by a one-hot over groups


def reference(kind: str, linear: nn.Linear, deltas: Mapping[str, Any], x_BTI: Tensor, onehot_TG: Tensor) -> Tensor:
    """The slow form of the paper; column 0 of the one-hot is "no adapter", the others are ``deltas`` in order."""
    owner_TG = onehot_TG[:, 1:]
    if kind == "lora":
        A_GRI = torch.stack([d.lora_A for d in deltas.values()])
        B_GOR = torch.stack([d.lora_B for d in deltas.values()])
        update_BTGO = 5.0 / 3 * torch.einsum("gor,gri,bti->btgo", B_GOR, A_GRI, x_BTI)
        return linear(x_BTI) + torch.einsum("btgo,tg->bto", update_BTGO, owner_TG)
    if kind == "bitfit":
        b_GO = torch.stack([d.bias for d in deltas.values()])
        return linear(x_BTI) + torch.einsum("go,tg->to", b_GO, owner_TG)
    scales_GD = torch.stack([d.ia3_l for d in deltas.values()])
    scale_TD = torch.einsum("gd,tg->td", scales_GD, owner_TG) + onehot_TG[:, :1]
    return linear(x_BTI * scale_TD) if kind == "ia3 down" else linear(x_BTI) * scale_TD


LAYOUTS: dict[str, Sequence[tuple[int, str]]] = {
    "two long segments": [(1, "text"), (6, "image"), (5, "text")],
    "interleaved": [(1, "text"), (2, "image"), (1, "audio"), (3, "image"), (2, "text"), (1, "audio"), (2, "image")],
    "an empty context": [(2, "text"), (0, "audio"), (7, "text")],
    "one context alone": [(9, "image")],
}


@pairwise(kind={kind: kind for kind in ("lora", "bitfit", "ia3 k", "ia3 down")}, grouping=GROUPINGS, layout=LAYOUTS)
def test_forward_and_gradients_equal_the_papers_algorithm(
    kind: str, grouping: Any, layout: Sequence[tuple[int, str]]
) -> None:
    """float64 on both sides, so 1e-12 relative is rounding only."""
    torch.manual_seed(0)
    linear = nn.Linear(12, 8).double()
    router = Router(resolve_grouping(grouping, ("image", "audio", "text"))[0])
    method = METHODS[kind.split(maxsplit=1)[0]]
    role = kind.split()[1] if " " in kind else "v"
    target = roles.Target("linear", role, 12, 8, layer=linear)
    deltas = {g: method.delta(target, torch.Generator().manual_seed(3)).double() for g in router.groups}
    disturb([p for delta in deltas.values() for p in delta.parameters()])
    segments, groups = [], []
    for length, context in layout:
        segments.append(Segment(len(groups), len(groups) + length, context))
        groups += [router.grouping[context]] * length
    change = method.change(target, deltas, None, torch.Generator()).double()
    adapted = AdaptedLayer(target, {kind: change}, router)
    router.set_layout(segments)
    onehot_TG = F.one_hot(torch.tensor([[None, *deltas].index(g) for g in groups]), 1 + len(deltas)).double()
    x_BTI = torch.randn(3, len(groups), 12, dtype=torch.float64, requires_grad=True)
    weight_BTO = torch.randn(3, len(groups), 8, dtype=torch.float64)
    wanted = [x_BTI, *linear.parameters(), *(p for delta in deltas.values() for p in delta.parameters())]

    expected_BTO = reference(kind, linear, deltas, x_BTI, onehot_TG)
    expected_grads = torch.autograd.grad((expected_BTO * weight_BTO).sum(), wanted)
    handles = adapted.attach(linear)
    assert handles
    found_BTO = linear(x_BTI)
    found_grads = torch.autograd.grad((found_BTO * weight_BTO).sum(), wanted)

    torch.testing.assert_close(found_BTO, expected_BTO, rtol=1e-12, atol=1e-12)
    for found, expected in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(found_BTO, F.linear(x_BTI, linear.weight, linear.bias)) or not onehot_TG[:, 1:].any()


def test_loras_dropout_acts_in_training_only_and_on_its_input_only() -> None:
    delta = LoRA(LoRAConfig(rank=2, dropout=0.5)).delta(roles.Target("q", "q", 6, 4), torch.Generator().manual_seed(0))
    disturb(delta.parameters())
    x_BTI, y_BTO = torch.ones(1, 400, 6), torch.zeros(1, 400, 4)
    expected_BTO = x_BTI @ delta.lora_A.T @ delta.lora_B.T  # type: ignore[operator, union-attr]
    torch.testing.assert_close(delta.eval()(x_BTI, y_BTO), expected_BTO)
    torch.manual_seed(0)
    dropped_BTO = delta.train()(x_BTI, y_BTO)
    inputs = {tuple(row) for row in torch.cartesian_prod(*[torch.tensor([0.0, 2.0])] * 6).tolist()}
    possible = torch.tensor(sorted(inputs)) @ delta.lora_A.T @ delta.lora_B.T  # type: ignore[operator, union-attr]
    assert (
        torch.cdist(dropped_BTO[0], possible, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values.max()
        < 1e-5
    )
    assert dropped_BTO[0].unique(dim=0).shape[0] > 30


# ── A token's output depends on its own group only


@each_method
@each_model
def test_a_groups_parameters_do_not_reach_the_positions_of_another(make_model: Any, method: AdapterMethod) -> None:
    model = make_model()
    adapters = adapt(model, method)
    path = next(iter(adapters.layers)).replace("/", ".")
    outputs: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda _m, _a, y: outputs.append(y))
    x_BTD = embeds()
    with torch.no_grad():
        model(inputs_embeds=x_BTD, use_cache=False)
        disturb([p for name, p in adapters.named_parameters() if ".deltas.group_image." in name], seed=7)
        model(inputs_embeds=x_BTD, use_cache=False)
    before_BTO, after_BTO = outputs
    image = torch.arange(11).ge(1) & torch.arange(11).lt(6)
    assert torch.equal(before_BTO[:, ~image], after_BTO[:, ~image])
    assert (before_BTO[:, image] != after_BTO[:, image]).any(dim=-1).all()


@each_method
@each_model
def test_specific_with_equal_weights_is_agnostic(make_model: Any, method: AdapterMethod) -> None:
    """In float64 to rounding; tests/contracts has fp32 (1e-6) and bf16, of a model that amplifies rounding less."""
    model, x_BTD = make_model().double(), embeds().double()
    agnostic = adapt(model, method, "agnostic").double()
    with torch.no_grad():
        expected_BTV = model(inputs_embeds=x_BTD, use_cache=False).logits
    agnostic.detach()
    specific = adapt(model, method, "specific").double()
    weights = agnostic.state_dict()
    specific.load_state_dict(
        {
            n: weights[n.replace("group_image", "group_all").replace("group_text", "group_all")]
            for n in specific.state_dict()
        }
    )
    with torch.no_grad():
        found_BTV = model(inputs_embeds=x_BTD, use_cache=False).logits
    # Llama's norms compute in fp32 whatever the model is in.
    assert ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item() < 1e-7


@each_method
def test_a_context_without_adapter_computes_as_the_base_does(method: AdapterMethod) -> None:
    model = tiny_llama()
    with torch.no_grad():
        base_BTV = model(inputs_embeds=embeds(), use_cache=False).logits
        adapters = adapt(model, method, {"image": "vision", "text": None})
        assert set(adapters.parameters_by_group()) == {"vision"}
        found_BTV = model(inputs_embeds=embeds(), use_cache=False).logits
        # Position 0 is text and sees only itself; the text after the image sees the image's changed keys and values.
        assert torch.equal(found_BTV[:, 0], base_BTV[:, 0])
        assert (found_BTV[:, 1:] != base_BTV[:, 1:]).any(dim=-1).all()


@each_method
def test_a_group_without_a_token_in_the_batch_has_zero_gradients(method: AdapterMethod) -> None:
    """Zero and not None: ZeRO-1 and -2 reduce wrong gradients where ranks or steps differ in what they use."""
    model = tiny_llama()
    adapters = adapt(model, method)
    adapters.router.set_layout([Segment(0, 11, "text")])
    model(inputs_embeds=embeds(), use_cache=False).logits.square().sum().backward()
    for name, p in adapters.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any().item() is (".deltas.group_text." in name), name


def test_groups_may_use_different_methods() -> None:
    """BitFit for images, LoRA for text: at the positions of its group, each equals the method alone."""
    model, x_BTD = tiny_llama(), embeds()
    adapters = adapt(model, {"image": BITFIT, "text": LORA})
    path = "model.layers.0.self_attn.q_proj"
    normed: list[Tensor] = []
    q_proj = model.get_submodule(path)
    outputs: list[Tensor] = []
    q_proj.register_forward_hook(lambda _m, args, _y: normed.append(args[0]))
    q_proj.register_forward_hook(lambda _m, _args, y: outputs.append(y))
    with torch.no_grad():
        model(inputs_embeds=x_BTD, use_cache=False)
    bias = adapters.get_parameter(f"layers.{path.replace('.', '/')}.changes.bitfit.deltas.group_image.bias")
    a, b = (
        adapters.get_parameter(f"layers.{path.replace('.', '/')}.changes.lora.deltas.group_text.lora_{x}") for x in "AB"
    )
    expected_BTO = normed[0] @ q_proj.weight.T
    expected_BTO[:, 1:6] += bias
    expected_BTO[:, [0, *range(6, 11)]] += 5.0 / 3 * normed[0][:, [0, *range(6, 11)]] @ a.T @ b.T
    torch.testing.assert_close(outputs[0], expected_BTO)


# ── Which layers


PATHS = {
    ("llama", "A"): ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    ("llama", "F"): ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    ("opt", "A"): ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"],
    ("opt", "F"): ["fc1", "fc2"],
}
IA3_PATHS = {
    ("llama", "A"): ["self_attn.k_proj", "self_attn.v_proj"],
    ("llama", "F"): ["mlp.down_proj"],
    ("opt", "A"): ["self_attn.k_proj", "self_attn.v_proj"],
    ("opt", "F"): ["fc2"],
}


@pairwise(
    name={name: name for name in METHODS},
    family={name: name for name in MODELS},
    where={"A": "A", "F": "F", "AF": "AF"},
)
def test_attention_feed_forward_or_both(name: str, family: str, where: Any) -> None:
    model = MODELS[family]()
    config = {"lora": LoRAConfig, "bitfit": BitFitConfig, "ia3": IA3Config}[name](where=where)
    adapters = adapt(model, type(METHODS[name])(config))
    layers = {"llama": "model.layers", "opt": "model.decoder.layers"}[family]
    table = IA3_PATHS if name == "ia3" else PATHS
    inside = [path for part in where for path in table[family, part]]
    assert {path.replace("/", ".") for path in adapters.layers} == {f"{layers}.{n}.{p}" for n in (0, 1) for p in inside}
    # Each of them takes part: the logits' gradient reaches every parameter of both groups.
    model(inputs_embeds=embeds(), use_cache=False).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())


@each_method
def test_opts_flattened_feed_forward_is_adapted_by_position(method: AdapterMethod) -> None:
    """OPT hands fc1 and fc2 all tokens of all rows as one list: a row alone must get what it gets in a batch."""
    model = tiny_opt()
    adapt(model, method)
    x_BTD = embeds()
    with torch.no_grad():
        together_BTV = model(inputs_embeds=x_BTD, use_cache=False).logits
        alone_BTV = torch.cat([model(inputs_embeds=row[None], use_cache=False).logits for row in x_BTD])
    torch.testing.assert_close(together_BTV, alone_BTV, rtol=1e-5, atol=1e-5)


# ── Options


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LoRAConfig, {"rank": 0}, "rank\n.*greater than 0"),
        (LoRAConfig, {"alpha": 0.0}, "alpha\n.*greater than 0"),
        (LoRAConfig, {"dropout": 1.0}, "dropout\n.*less than 1"),
        (LoRAConfig, {"rank": "8"}, "rank\n.*valid integer"),
        (IA3Config, {"where": "FA"}, "where.*\n.*'A', 'F' or 'AF'"),
        (BitFitConfig, {"where": "B"}, "where.*\n.*'A', 'F' or 'AF'"),
    ],
)
def test_options_out_of_range_are_refused(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**options)


def test_a_place_where_the_method_does_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match=r"IA3 q acts on no layer with these options: .*where=\('q',\)"):
        adapt(tiny_llama(), IA3(IA3Config(where=("q",))))


def test_a_role_named_by_hand_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(UserError, match="with the role gate; it has down, k, norm, o, q, up, v"):
        adapt(tiny_opt(), LoRA(LoRAConfig(where=("q", "gate"))))
