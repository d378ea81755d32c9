"""DoRA, VeRA, LN-tuning and bottleneck adapters against their papers' equations, token by token in float64.

Shapes: B rows, T positions, D width, I and O input and output features of a layer, X 1 or B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM

from adapters.attach import AdaptedLayer, Adapters
from adapters.base import AdapterMethod
from adapters.library.merge import merge_into
from adapters.methods.bottleneck import Bottleneck, BottleneckConfig
from adapters.methods.dora import DoRA, DoRAConfig
from adapters.methods.ln_tuning import LNTuning, NormDelta
from adapters.methods.vera import VeRA, VeRAConfig
from adapters.placement.generation import layouts_while_generating
from adapters.placement.roles import Target
from adapters.placement.router import Router
from harness.core.contexts import Segment, resolve_grouping
from harness.core.errors import UserError
from tests.support.adapters import GROUPINGS, adapt, disturb, embeds
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt, with_biases
from tests.support.tiers import pairwise

pytestmark = pytest.mark.quick

DORA, VERA, LN = DoRA(DoRAConfig(rank=3, alpha=5.0)), VeRA(VeRAConfig(rank=5)), LNTuning(LNTuning.Config())
SERIAL = Bottleneck(BottleneckConfig(bottleneck_size=4))
PARALLEL = Bottleneck(BottleneckConfig(bottleneck_size=4, placement="parallel", non_linearity="gelu", scale=2.0))
METHODS: dict[str, AdapterMethod] = {"dora": DORA, "vera": VERA, "ln": LN, "serial": SERIAL, "parallel": PARALLEL}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
CONTEXTS = ("image", "audio", "text")


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = GemmaForCausalLM(config).eval().requires_grad_(False)
    disturb(p for name, p in model.named_parameters() if "norm" in name)  # from zeros, which would hide the 1 + weight
    return model


MODELS = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2}
BASES = [(m, name) for m in MODELS for name in METHODS if (m, name) != ("opt", "parallel")]  # OPT's block is no module
each_base = pytest.mark.parametrize(("model_name", "name"), BASES)


# ── The papers' equations, one token at a time


def layer_of(kind: str) -> tuple[nn.Module, Target]:
    torch.manual_seed(0)
    if kind == "ln":
        norm = nn.LayerNorm(12).double()
        disturb(norm.parameters())
        return norm, Target("norm", "norm", 12, 12, layer=norm)
    if kind == "parallel":
        block = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12)).double()
        return block, Target("mlp", "mlp", 12, 12, layer=block)
    linear = nn.Linear(12, 8).double()
    rows = (1, 4, 5) if kind.endswith("of a part") else None
    return linear, Target("linear", "o" if kind == "serial" else "v", 12, len(rows or range(8)), rows, linear)


def token_reference(kind: str, layer: Any, delta: Any, shared: Any, x_I: Tensor) -> Tensor:
    """The output for one token of the delta's group, as the paper defines it."""
    y_O: Tensor = layer(x_I)
    if kind == "ln":
        return delta.scale * y_O + delta.offset
    if kind == "serial":
        hidden = torch.relu(delta.down_weight @ y_O + delta.down_bias)
        return y_O + delta.up_weight @ hidden + delta.up_bias
    if kind == "parallel":
        hidden = F.gelu(delta.down_weight @ x_I + delta.down_bias)
        return y_O + 2.0 * (delta.up_weight @ hidden + delta.up_bias)
    rows = [1, 4, 5] if kind.endswith("of a part") else list(range(8))
    weight_OI, bias_O = layer.weight[rows], layer.bias[rows]
    if kind.startswith("vera"):
        a_RI, b_OR = shared.vera_A[:, :12], shared.vera_B[: len(rows)]
        part_O = weight_OI @ x_I + bias_O + delta.vera_lambda_b * (b_OR @ (delta.vera_lambda_d * (a_RI @ x_I)))
    else:
        adapted_OI = weight_OI + 5.0 / 3 * delta.lora_B @ delta.lora_A
        norm_O = adapted_OI.square().sum(dim=1).sqrt().detach()
        part_O = delta.lora_magnitude_vector / norm_O * (adapted_OI @ x_I) + bias_O
    return torch.stack([part_O[rows.index(o)] if o in rows else y_O[o] for o in range(8)])


LAYOUTS = {
    "two long segments": [[2, 0, 0, 0, 0, 2, 2]],
    "interleaved": [[2, 0, 0, 1, 0, 2, 1, 0]],
    "an empty context": [[2, 2, 0, 0, 0]],
    "one context alone": [[0, 0, 0, 0]],
    "rows that differ": [[2, 0, 0, 1, 2], [0, 0, 2, 2, 2], [1, 2, 0, 1, 2]],
    "rows that differ and an empty context": [[2, 0, 0, 2, 2], [0, 0, 2, 2, 2], [2, 2, 0, 0, 2]],
}
KINDS = ("dora", "dora of a part", "vera", "vera of a part", "ln", "serial", "parallel")


@pairwise(kind={kind: kind for kind in KINDS}, grouping=GROUPINGS, layout=LAYOUTS)
def test_forward_and_gradients_equal_the_papers_equations(kind: str, grouping: Any, layout: list[list[int]]) -> None:
    """float64 on both sides, so 1e-12 relative is rounding only. A group without a token has zeros, not None."""
    layer, target = layer_of(kind)
    method = METHODS[kind.split(maxsplit=1)[0]]
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    larger = Target("elsewhere", "v", 14, 10)
    shared = method.shared([target, larger], torch.Generator().manual_seed(4))
    deltas = {g: method.delta(target, torch.Generator().manual_seed(3)).double() for g in router.groups}
    parameters = [p for delta in deltas.values() for p in delta.parameters()]
    disturb(parameters)
    change = method.change(target, deltas, shared and shared.double(), torch.Generator()).double()
    adapted = AdaptedLayer(target, {"one": change}, router)
    router.set_context_ids(torch.tensor(layout))
    length = len(layout[0])
    x_BTI = torch.randn(3, length, 12, dtype=torch.float64, requires_grad=True)
    groups = [[router.grouping[CONTEXTS[c]] for c in layout[b % len(layout)]] for b in range(3)]
    wanted = [x_BTI, *layer.parameters(), *parameters]

    expected_BTO = torch.stack([
        torch.stack([
            layer(x_I) if (g := groups[b][t]) is None else token_reference(kind, layer, deltas[g], shared, x_I)
            for t, x_I in enumerate(x_TI)
        ])
        for b, x_TI in enumerate(x_BTI)
    ])  # fmt: skip
    weight_BTO = torch.randn_like(expected_BTO)
    expected = torch.autograd.grad((expected_BTO * weight_BTO).sum(), wanted, materialize_grads=True)
    base_BTO = layer(x_BTI).detach()
    assert adapted.attach(layer)
    found_BTO = layer(x_BTI)
    found = torch.autograd.grad((found_BTO * weight_BTO).sum(), wanted)

    torch.testing.assert_close(found_BTO, expected_BTO, rtol=1e-12, atol=1e-12)
    for found_grad, expected_grad in zip(found, expected, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-12, atol=1e-12)
    adapted_BT = torch.tensor([[g is not None for g in row] for row in groups])
    assert torch.equal((found_BTO.detach() != base_BTO).any(dim=-1), adapted_BT)


# ── In whole models


@each_base
def test_at_initialisation_nothing_changes_bit_for_bit(model_name: str, name: str) -> None:
    model = with_biases(MODELS[model_name])
    router = Router(dict(zip(CONTEXTS, CONTEXTS, strict=True)))
    adapters = Adapters(model, dict.fromkeys(CONTEXTS, METHODS[name]), router, seed=0)
    with torch.no_grad():
        base_BTV = model(inputs_embeds=embeds(3, 5), use_cache=False).logits
        adapters.attach(model)
        for layout in (LAYOUTS["rows that differ"], [[2, 0, 1, 0, 2]], [[1] * 5]):
            router.set_context_ids(torch.tensor(layout))
            assert torch.equal(model(inputs_embeds=embeds(3, 5), use_cache=False).logits, base_BTV)
        disturb(adapters.parameters())
        assert not torch.equal(model(inputs_embeds=embeds(3, 5), use_cache=False).logits, base_BTV)


@each_base
def test_a_groups_parameters_do_not_reach_the_positions_of_another(model_name: str, name: str) -> None:
    model = with_biases(MODELS[model_name])
    adapters = adapt(model, METHODS[name])
    outputs: list[Tensor] = []  # of all adapted layers, in the order in which the model calls them
    for path in adapters.layers:
        layer = model.get_submodule(path.replace("/", "."))
        layer.register_forward_hook(lambda _m, _a, y: outputs.append(y.view(3, 11, -1)))
    with torch.no_grad():
        model(inputs_embeds=embeds(), use_cache=False)
        disturb([p for n, p in adapters.named_parameters() if ".deltas.group_image." in n], seed=7)
        model(inputs_embeds=embeds(), use_cache=False)
    before_BTO, after_BTO = outputs[0], outputs[len(adapters.layers)]
    image_T = torch.arange(11).ge(1) & torch.arange(11).lt(6)
    assert torch.equal(before_BTO[:, ~image_T], after_BTO[:, ~image_T])
    assert (before_BTO[:, image_T] != after_BTO[:, image_T]).any(dim=-1).all()


@each_base
def test_a_group_without_a_token_in_the_batch_has_zero_gradients(model_name: str, name: str) -> None:
    model = with_biases(MODELS[model_name])
    adapters = adapt(model, METHODS[name])
    adapters.router.set_layout([Segment(0, 11, "text")])
    model(inputs_embeds=embeds(), use_cache=False).logits.square().sum().backward()
    for n, p in adapters.named_parameters():
        assert p.grad is not None, n
        assert p.grad.any().item() is (".deltas.group_text." in n), n


@each_base
def test_merged_weights_compute_the_same(model_name: str, name: str) -> None:
    """In float64, so that merging in another order of operations may differ by rounding only."""
    model = with_biases(MODELS[model_name]).double()
    adapters = adapt(model, METHODS[name], "agnostic").double()
    with torch.no_grad():
        expected_BTV = model(inputs_embeds=embeds().double(), use_cache=False).logits
    if name in ("serial", "parallel"):
        with pytest.raises(UserError, match="bottleneck cannot be merged"):
            merge_into(model, adapters)
        return
    if (model_name, name) == ("llama", "ln"):
        with pytest.raises(UserError, match=r"ln_tuning cannot be merged.*LlamaRMSNorm has no bias"):
            merge_into(model, adapters)
        with torch.no_grad():
            without_offsets(adapters)
            expected_BTV = model(inputs_embeds=embeds().double(), use_cache=False).logits
    merge_into(model, adapters)
    adapters.detach()
    with torch.no_grad():
        found_BTV = model(inputs_embeds=embeds().double(), use_cache=False).logits
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-10, atol=1e-10)


def without_offsets(adapters: Adapters) -> None:
    for name, p in adapters.named_parameters():
        if name.endswith("offset"):
            p.zero_()


def test_ln_tuning_is_merged_into_norms_that_multiply_by_one_plus_their_weight() -> None:
    model = tiny_gemma().double()
    adapters = adapt(model, LN, "agnostic").double()
    with torch.no_grad():
        without_offsets(adapters)
        expected_BTV = model(inputs_embeds=embeds().double(), use_cache=False).logits
        merge_into(model, adapters)
        adapters.detach()
        found_BTV = model(inputs_embeds=embeds().double(), use_cache=False).logits
    # Gemma's norms compute in float32 whatever they are given.
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=0, atol=1e-6 * expected_BTV.abs().max().item())


def test_ln_tuning_is_not_merged_into_a_norm_that_does_something_else_with_its_weight() -> None:
    class SquaredNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight

    norm = SquaredNorm(6)
    nn.init.constant_(norm.weight, 3.0)
    delta = NormDelta(Target("norm", "norm", 6, 6, layer=norm))
    with pytest.raises(UserError, match="SquaredNorm does not multiply by its weight"):
        delta.merge(norm.weight, torch.zeros(6))


def test_ln_tuning_wants_a_norm_with_a_weight() -> None:
    norm = nn.LayerNorm(6, elementwise_affine=False)
    with pytest.raises(UserError, match=r"model\.norm: found a LayerNorm without weight"):
        LN.delta(Target("model.norm", "norm", 0, 0, layer=norm), torch.Generator())


@each_method
@pytest.mark.parametrize("layout", [[[2, 0, 0, 1, 2]], LAYOUTS["rows that differ"], [[0] * 5]], ids=str)
def test_fp32_adapters_on_a_bf16_base_stay_in_bf16_and_near_fp32(method: AdapterMethod, layout: Any) -> None:
    """Logits of a bf16 model with fp32 adapters, against the same weights in fp32: 3 % of the largest."""
    model = tiny_llama()
    router = Router(dict(zip(CONTEXTS, CONTEXTS, strict=True)))
    adapters = Adapters(model.bfloat16(), dict.fromkeys(CONTEXTS, method), router, seed=0)
    disturb(adapters.parameters(), scale=0.1)
    adapters.attach(model)
    router.set_context_ids(torch.tensor(layout))
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    found_BTV = model(inputs_embeds=embeds(3, 5).bfloat16(), use_cache=False).logits
    assert found_BTV.dtype == torch.bfloat16
    found_BTV.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())
    with torch.no_grad():
        expected_BTV = model.float()(inputs_embeds=embeds(3, 5).bfloat16().float(), use_cache=False).logits
    assert (found_BTV.detach().float() - expected_BTV).abs().max() < 0.03 * expected_BTV.abs().max()


@pytest.mark.parametrize("name", ["dora", "vera", "ln", "serial"])
def test_opts_flattened_layers_are_adapted_by_position(name: str) -> None:
    """OPT hands some layers all tokens of all rows as one list: a row alone must get what it gets in a batch."""
    model = tiny_opt()
    adapters = adapt(model, METHODS[name])
    layout = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 1, 1], [1, 1, 0, 0, 1]])
    x_BTD = embeds(3, 5)
    with torch.no_grad():
        adapters.router.set_context_ids(layout)
        together_BTV = model(inputs_embeds=x_BTD, use_cache=False).logits
        for row, ids_T in enumerate(layout):
            adapters.router.set_context_ids(ids_T[None])
            alone_BTV = model(inputs_embeds=x_BTD[row : row + 1], use_cache=False).logits
            torch.testing.assert_close(together_BTV[row : row + 1], alone_BTV, rtol=1e-5, atol=1e-5)


@each_method
def test_generation_with_the_kv_cache_equals_recomputation(method: AdapterMethod) -> None:
    model = tiny_llama()
    adapters = adapt(model, method)
    tokens: list[Tensor] = []
    for use_cache in (True, False):
        adapters.router.set_context_ids(torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 1, 1], [1, 1, 0, 0, 1]]))
        with layouts_while_generating(model, adapters.router, "text"), torch.no_grad():
            tokens.append(
                model.generate(inputs_embeds=embeds(3, 5), max_new_tokens=8, do_sample=False, use_cache=use_cache,
                               pad_token_id=0, attention_mask=torch.ones(3, 5, dtype=torch.long))
            )  # fmt: skip
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0].unique().numel() > 3
