"""Stacked groups: one that all tokens share and one per context, both acting on every token (``shared+specific``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import harness
from harness.core.errors import UserError
from harness.core.weight_decay import parameter_groups
from tests.support.adapted import IDS_T, ROWS_BT, SPECS, adapted_model, logits
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_llama, tiny_opt, with_biases

pytestmark = pytest.mark.quick

STACKED = "shared+specific"
NAMES = (
    "lora", "lora, many columns", "pissa", "vera", "bitfit", "ia3", "ln_tuning", "bottleneck", "parallel bottleneck",
)  # fmt: skip
each_stacked = pytest.mark.parametrize("spec", [SPECS[name] for name in NAMES], ids=NAMES)
CONTEXTS = ("image", "text")

# ── One layer, one token at a time, in float64


def pair(x_I: Tensor, deltas: Any, scale: float) -> Tensor:
    """What the low-rank pairs of all groups of a token add."""
    added = [
        delta.lora_B @ (delta.lora_A @ x_I) - (delta.start_B @ (delta.start_A @ x_I) if delta.has_start else 0.0)
        for delta in deltas
    ]
    return scale * torch.stack(added).sum(dim=0)


def hidden(z_D: Tensor, deltas: Any, act: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([
        d.up_weight @ act(d.down_weight @ z_D + d.down_bias) + d.up_bias for d in deltas
    ]).sum(dim=0)  # fmt: skip


def random_pair(x_I: Tensor, deltas: Any, shared: Any) -> Tensor:
    added = []
    for d in deltas:
        A_RI, B_OR = shared.vera_A[:, : len(x_I)], shared.vera_B[: len(d.vera_lambda_b)]
        added.append(d.vera_lambda_b * (B_OR @ (d.vera_lambda_d * (A_RI @ x_I))))
    return torch.stack(added).sum(dim=0)


def product(deltas: Any, name: str) -> Tensor:
    return torch.stack([getattr(d, name) for d in deltas]).prod(dim=0)


def total(deltas: Any, name: str) -> Tensor:
    return torch.stack([getattr(d, name) for d in deltas]).sum(dim=0)


Plain = Callable[[Tensor], Tensor]
Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj"
# spec, layer, and the output of the plain layer f for one token x, whose groups have the deltas d
REFERENCES: dict[str, tuple[Any, str, Callable[[Plain, Tensor, Any, Any], Tensor]]] = {
    "lora": (SPECS["lora"], Q, lambda f, x, d, _: f(x) + pair(x, d, 5 / 3)),
    "lora, alone in its layer": (SPECS["lora"], DOWN, lambda f, x, d, _: f(x) + pair(x, d, 5 / 3)),
    "lora, many columns": (SPECS["lora, many columns"], Q, lambda f, x, d, _: f(x) + pair(x, d, 1.0)),
    "rslora": ({"method": "lora", "rank": 4, "use_rslora": True}, V, lambda f, x, d, _: f(x) + pair(x, d, 2.0)),
    "pissa": (SPECS["pissa"], Q, lambda f, x, d, _: f(x) + pair(x, d, 1.0)),
    "vera": (SPECS["vera"], Q, lambda f, x, d, shared: f(x) + random_pair(x, d, shared)),
    "bitfit": (SPECS["bitfit"], Q, lambda f, x, d, _: f(x) + total(d, "bias")),
    "ia3": (SPECS["ia3"], V, lambda f, x, d, _: f(x) * product(d, "ia3_l")),
    "ia3 of an input": (SPECS["ia3"], DOWN, lambda f, x, d, _: f(x * product(d, "ia3_l"))),
    "ln_tuning": (
        SPECS["ln_tuning"], "model.layers.0.input_layernorm",
        lambda f, x, d, _: f(x) * product(d, "scale") + total(d, "offset"),
    ),
    "bottleneck": (SPECS["bottleneck"], DOWN, lambda f, x, d, _: f(x) + hidden(f(x), d, F.relu)),
    "parallel bottleneck": (
        SPECS["parallel bottleneck"], "model.layers.1.mlp", lambda f, x, d, _: f(x) + hidden(x, d, F.relu)
    ),
    "lora+bitfit": (
        {"method": "lora+bitfit", "rank": 2}, Q, lambda f, x, d, _: f(x) + pair(x, d[0], 1.0) + total(d[1], "bias")
    ),
}  # fmt: skip
LAYOUTS = {
    "two long segments": [[1, 0, 0, 0, 0, 1, 1]],
    "interleaved": [[1, 0, 0, 1, 0, 1, 1, 0]],
    "an empty context": [[1] * 5],
    "rows that differ": [[1, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 1, 0]],
    "rows that differ and an empty context": [[0] * 4, [0] * 4, [0] * 4],
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def deltas_at(adapted: Any, path: str, group: str) -> list[Any]:
    found = [delta for _, target, delta in adapted.adapters.deltas_of(group) if target.path == path]
    assert found
    return found


@each_layout
@pytest.mark.parametrize("kind", REFERENCES)
def test_forward_and_gradients_are_the_sum_or_product_of_both_groups(kind: str, layout: list[list[int]]) -> None:
    """Against the formula, in float64: 1e-11 relative to the largest number is rounding only."""
    spec, path, formula = REFERENCES[kind]
    plain_model = tiny_llama().double()
    plain = plain_model.get_submodule(path)
    adapted = adapted_model(copy.deepcopy(plain_model), spec, STACKED)
    layer = adapted.base_model.get_submodule(path)
    features = {DOWN: 48}.get(path, 32)
    x_BTI = torch.randn(3, len(layout[0]), features, dtype=torch.float64, requires_grad=True)
    by_group = {group: deltas_at(adapted, path, group) for group in ("shared", *CONTEXTS)}
    parameters = [p for deltas in by_group.values() for delta in deltas for p in delta.parameters()]
    shared = next(iter(adapted.adapters.shared.values()), None)

    def both(context: str) -> Any:
        stacked = list(zip(by_group["shared"], by_group[context], strict=True))
        return stacked if len(stacked) > 1 else stacked[0]

    expected_BTO = torch.stack([
        torch.stack([formula(plain, x_I, both(CONTEXTS[c]), shared) for x_I, c in zip(x_TI, row, strict=True)])
        for x_TI, row in zip(x_BTI, layout * (3 // len(layout)), strict=True)
    ])  # fmt: skip
    with adapted.router.one_pass():
        adapted.router.set_context_ids(torch.tensor(layout))
        found_BTO = layer(x_BTI)
    weight_BTO = torch.randn_like(expected_BTO)
    found, expected = (
        torch.autograd.grad((y_BTO * weight_BTO).sum(), [x_BTI, *parameters], materialize_grads=True)
        for y_BTO in (found_BTO, expected_BTO)
    )
    for mine, other in zip((found_BTO, *found), (expected_BTO, *expected), strict=True):
        assert (mine - other).abs().max() <= 1e-11 * other.abs().max().clamp(min=1)


def test_a_group_without_tokens_has_zero_gradients_and_the_shared_one_has_not() -> None:
    adapted = adapted_model(tiny_llama(), SPECS["lora"], STACKED)
    adapted(inputs_embeds=embeds(), context_ids=torch.ones(11).long()).logits.square().sum().backward()
    for name, p in adapted.adapters.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.any()) is ("group_image" not in name.split(".")), name


# ── Whole models, in the precision and by the ways that trials take


def stacked_and_parts(spec: Any) -> tuple[Any, Any, Any]:
    """A stacked model; the same without its own groups; the same without the shared group."""
    adapted = adapted_model(tiny_llama(), spec, STACKED)
    agnostic, specific = (harness.adapt(tiny_llama(), spec, grouping=g) for g in ("agnostic", "specific"))
    whole = adapted.adapters.state_dict()
    with torch.no_grad():
        for part, old, new in ((agnostic, "group_all", "group_shared"), (specific, "", "")):
            for name, tensor in part.adapters.state_dict(keep_vars=True).items():
                tensor.copy_(whole[name.replace(old, new)])
    return adapted, agnostic, specific


def start_again(adapted: Any, spec: Any, groups: tuple[str, ...]) -> None:
    """Give some groups the parameters that they began with."""
    fresh = harness.adapt(tiny_llama(), spec, grouping=STACKED).adapters.state_dict()
    with torch.no_grad():
        for name, tensor in adapted.adapters.state_dict(keep_vars=True).items():
            if {f"group_{group}" for group in groups} & set(name.split(".")):
                tensor.copy_(fresh[name])


@each_stacked
@pytest.mark.parametrize("ids", [IDS_T, ROWS_BT], ids=["rows alike", "rows differ"])
def test_either_part_alone_is_the_agnostic_or_the_specific_model(spec: Any, ids: Tensor) -> None:
    adapted, agnostic, specific = stacked_and_parts(spec)
    both_BTV = logits(adapted, embeds(), ids)
    again = copy.deepcopy(adapted)
    start_again(again, spec, CONTEXTS)
    torch.testing.assert_close(logits(again, embeds(), ids), logits(agnostic, embeds(), ids), rtol=1e-5, atol=1e-5)
    start_again(adapted, spec, ("shared",))
    torch.testing.assert_close(logits(adapted, embeds(), ids), logits(specific, embeds(), ids), rtol=1e-5, atol=1e-5)
    assert (both_BTV - logits(specific, embeds(), ids)).abs().max() > 1e-3


@each_stacked
def test_at_initialisation_nothing_changes_bit_for_bit_nor_by_decay(spec: Any) -> None:
    with torch.no_grad():
        bare_BTV = tiny_llama()(inputs_embeds=embeds()).logits
    adapted = harness.adapt(tiny_llama(), spec, grouping=STACKED)
    assert torch.equal(logits(adapted, embeds(), IDS_T), bare_BTV)
    assert torch.equal(logits(adapted, embeds(), ROWS_BT), bare_BTV)
    grouped = [p for group in parameter_groups(adapted.adapters, 0.5) for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(adapted.adapters.parameters()))


@each_stacked
@pytest.mark.parametrize("rows", [3, 40], ids=["few rows", "many rows"])
def test_fp32_is_the_float64_model_up_to_rounding(spec: Any, rows: int) -> None:
    """With few rows LoRA's products are added to the layers', with many its weights are folded."""
    adapted = adapted_model(tiny_llama(), spec, STACKED)
    exact = copy.deepcopy(adapted).double()
    x_BTD = embeds(rows)
    names, losses = [], []
    for model, x in ((adapted, x_BTD), (exact, x_BTD.double())):
        losses.append(model(inputs_embeds=x, context_ids=IDS_T).logits.square().mean())
        losses[-1].backward()
        names.append(dict(model.adapters.named_parameters()))
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    largest = max(p.grad.abs().max().item() for p in names[1].values())
    for name, p in names[0].items():
        torch.testing.assert_close(p.grad.double(), names[1][name].grad, rtol=0, atol=1e-4 * largest)


@each_stacked
def test_generation_with_a_cache_is_generation_without(spec: Any) -> None:
    adapted = adapted_model(tiny_llama(), spec, STACKED)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids_BT = torch.randint(64, (3, 11), generator=torch.Generator().manual_seed(3))
    cached, plain = (
        adapted.generate(ids_BT, context_ids=ROWS_BT, new_token_context="text", use_cache=own, **options)
        for own in (True, False)
    )
    assert torch.equal(cached, plain)


def test_checkpointing_and_functional_calls_keep_the_gradients() -> None:
    adapted = adapted_model(tiny_llama(), SPECS["lora"], STACKED)
    parameters = dict(adapted.adapters.named_parameters())

    def grads() -> list[Tensor]:
        loss = adapted(inputs_embeds=embeds().requires_grad_(), context_ids=ROWS_BT).logits.square().sum()
        return list(torch.autograd.grad(loss, list(parameters.values())))

    expected = grads()

    def loss_of(given: dict[str, Tensor]) -> Tensor:
        named = {f"adapters.{name}": p for name, p in given.items()}
        options = {"inputs_embeds": embeds(), "context_ids": ROWS_BT}
        loss: Tensor = torch.func.functional_call(adapted, named, (), options).logits.square().sum()
        return loss

    functional = torch.func.grad(loss_of)({name: p.detach() for name, p in parameters.items()})
    adapted.train()
    adapted.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    scale = max(grad.abs().max() for grad in expected)
    for found in (grads(), [functional[name] for name in parameters]):
        for mine, other in zip(found, expected, strict=True):
            assert (mine - other).abs().max() <= 1e-5 * scale


# ── What a model with stacked groups is made of


def test_the_parameters_are_those_of_agnostic_and_specific_together() -> None:
    for name in NAMES:
        stacked, agnostic, specific = (
            harness.adapt(tiny_llama(), SPECS[name], grouping=g).num_trainable_parameters(by="group")
            for g in (STACKED, "agnostic", "specific")
        )
        assert stacked == {"shared": agnostic["all"], **specific}


@each_stacked
def test_saved_loaded_and_copied_it_computes_the_same(spec: Any, tmp_path: Any) -> None:
    adapted = adapted_model(tiny_llama(), spec, STACKED)
    expected_BTV = logits(adapted, embeds(), ROWS_BT)
    assert torch.equal(logits(copy.deepcopy(adapted), embeds(), ROWS_BT), expected_BTV)
    adapted.save(tmp_path / "saved")
    loaded = harness.load_adapter(tiny_llama(), tmp_path / "saved", CONTEXTS)
    assert loaded.num_trainable_parameters(by="group") == adapted.num_trainable_parameters(by="group")
    assert torch.equal(logits(loaded, embeds(), ROWS_BT), expected_BTV)
    disturb(loaded.adapters.parameters(), seed=9)  # the copy's deltas are its own, the shared one too
    assert not torch.equal(logits(loaded, embeds(), ROWS_BT), expected_BTV)
    assert torch.equal(logits(adapted, embeds(), ROWS_BT), expected_BTV)


@each_stacked
def test_it_merges_where_one_context_is_left(spec: Any) -> None:
    several = adapted_model(tiny_llama(), spec, STACKED)
    with pytest.raises(UserError, match="found image: shared \\+ image, text: shared \\+ text"):
        several.merge()
    model = with_biases(tiny_opt) if spec["method"] == "ln_tuning" else tiny_llama()  # an RMSNorm has no offset
    adapted = adapted_model(model, spec, STACKED, contexts=("text",))
    if spec["method"] == "bottleneck":
        with pytest.raises(UserError, match="cannot be merged"):
            adapted.merge()
        return
    expected_BTV = logits(adapted, embeds(), torch.zeros(11).long())
    with torch.no_grad():
        merged_BTV = adapted.merge()(inputs_embeds=embeds()).logits
    torch.testing.assert_close(merged_BTV, expected_BTV, rtol=1e-4, atol=1e-4)


# ── Messages


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"method": "dora"}, {}, "grouping: dora cannot have a shared group .*: its magnitude is of one direction"),
        ({"method": "moka"}, {}, "grouping: moka cannot have .*: its groups already share B"),
        ({"method": "soft_prompt"}, {}, "grouping: soft_prompt cannot have .*: a token attends to one prompt"),
        ({"method": "bitfit+dora"}, {}, "grouping: dora cannot have a shared group"),
        ({"method": "full"}, {}, "grouping: full has no adapter groups; leave 'grouping' out"),
        (
            {"image": {"method": "lora"}, "text": {"method": "bitfit"}}, {},
            "grouping: found 'shared\\+specific' with a method for each group; allowed with .*: one method for all",
        ),
        (
            {"method": "lora"}, {"contexts": ("shared", "text")},
            "grouping: found 'shared\\+specific', whose common group has the name of the context 'shared'",
        ),
        ({"method": "lora"}, {"grouping": "shared+specfic"}, "grouping: found .*did you mean 'shared\\+specific'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_stacked(spec: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        harness.adapt(tiny_llama(), spec, **{"grouping": STACKED, **options})


def test_a_method_of_a_group_that_acts_on_all_tokens() -> None:
    mixed = {"image": {"method": "mmca+lora", "rank": 2}, "text": {"method": "lora", "rank": 2}}
    with pytest.raises(UserError, match=r"spec.image.method: mmca has no .* acts on all tokens, but text"):
        harness.adapt(tiny_llama(), mixed, grouping="specific")
    alike = {"image": {"method": "mmca+lora", "rank": 2}, "text": {"method": "mmca+bitfit"}}
    harness.adapt(tiny_llama(), alike, grouping="specific").detach()
