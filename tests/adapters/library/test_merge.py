"""Merged, the base computes by itself what it computed with adapters.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from adapters import base
from adapters.attach import Adapters
from adapters.library.merge import merge_into
from adapters.placement.roles import Target
from adapters.placement.router import Router
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, adapted_model, logits, traces
from tests.support.adapters import disturb, embeds
from tests.support.models import each_model, tiny_llama, tiny_opt

# GPT-2 stores weights the other way round and has q, k and v in one layer.
GPT2_ROLES = {"transformer.h.*.attn.c_attn": ["q", "k", "v"], "transformer.h.*.mlp.c_proj": "down"}


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def bare(model: Any) -> Tensor:
    dtype = model.get_input_embeddings().weight.dtype
    logits_BTV: Tensor = model(inputs_embeds=embeds().to(dtype)).logits
    return logits_BTV


METHODS = ["lora", "bitfit", "ia3", "lora+bitfit", "lora+ia3", "ia3+lora"]


@pytest.mark.parametrize("method", METHODS)
@each_model
def test_the_merged_base_has_the_adapted_models_logits(make_model: Any, method: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = make_model().to(dtype)
        adapted = adapted_model(model, {"method": method}, "agnostic")
        x_BTD = embeds().to(dtype)
        bare_BTV, expected_BTV = bare(make_model().to(dtype)), logits(adapted, x_BTD, IDS_T)
        assert not torch.allclose(bare_BTV, expected_BTV, rtol=0.1, atol=0.1)
        assert adapted.merge() is model
        torch.testing.assert_close(bare(model), expected_BTV, rtol=tolerance, atol=tolerance * bare_BTV.abs().max())
        assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        has_biases = "bitfit" in method or make_model is tiny_opt
        assert any(n.endswith("q_proj.bias") for n, _ in model.named_parameters()) is has_biases


@pytest.mark.parametrize("where", ["A", ["q", "v"], ["k"], "AF"], ids=str)
def test_parts_of_a_fused_layer_and_weights_stored_the_other_way_round(where: Any) -> None:
    model = tiny_gpt2()
    x_BTD, bare_BTV = embeds(), bare(model)
    adapted = adapted_model(model, {"method": "lora+bitfit", "where": where}, "agnostic", roles=GPT2_ROLES)
    expected_BTV = logits(adapted, x_BTD, IDS_T)
    assert not torch.allclose(bare_BTV, expected_BTV, rtol=0.1, atol=0.1)
    adapted.merge()
    torch.testing.assert_close(bare(model), expected_BTV, rtol=1e-5, atol=1e-5 * bare_BTV.abs().max().item())


def test_a_group_that_all_contexts_share_by_name_is_one_group() -> None:
    adapted = adapted_model(tiny_llama(), LORA, {"image": "both", "text": "both"})
    expected_BTV = logits(adapted, embeds(), IDS_T)
    torch.testing.assert_close(bare(adapted.merge()), expected_BTV, rtol=1e-5, atol=1e-4)


def test_methods_that_add_nothing_to_the_base_merge_to_the_base() -> None:
    model = tiny_llama()
    bare_BTV = bare(model)
    assert torch.equal(bare(adapted_model(model, {"method": "none"}, "agnostic").merge()), bare_BTV)


def test_the_scale_and_offset_of_a_norm_with_a_bias() -> None:
    model = tiny_opt()
    adapted = adapted_model(model, {"method": "ln_tuning"}, "agnostic")
    expected_BTV = logits(adapted, embeds(), IDS_T)
    torch.testing.assert_close(bare(adapted.merge()), expected_BTV, rtol=1e-5, atol=1e-4)


# ── What cannot be merged


@pytest.mark.parametrize(
    ("spec", "grouping", "message"),
    [
        (LORA, "specific", "all contexts must share a group; found image: image, text: text"),
        (LORA, {"image": "v", "text": None}, "all contexts must share a group; found image: v, text: no adapter"),
        ({"method": "ln_tuning"}, "agnostic", "ln_tuning cannot be merged at layer model.layers.0.input_layernorm: "),
        ({"method": "bottleneck"}, "agnostic", "bottleneck cannot be merged at layer model.layers.0.self_attn.o_proj"),
    ],
    ids=str,
)
def test_what_no_weight_can_stand_for_is_an_error_and_changes_nothing(spec: Any, grouping: Any, message: str) -> None:
    adapted = adapted_model(tiny_llama(), spec, grouping)
    expected_BTV, before = logits(adapted, embeds(), IDS_T), traces(adapted.base_model)
    weights = {name: x.clone() for name, x in adapted.base_model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        adapted.merge()
    assert traces(adapted.base_model) == before
    assert all(torch.equal(x, weights[name]) for name, x in adapted.base_model.state_dict().items())
    assert torch.equal(logits(adapted, embeds(), IDS_T), expected_BTV)


class Offset(base.Delta):
    """A user's own, which does not look at what kind of layer it is merged into."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        return value_BTD + self.offset

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        return weight_OI, bias_O + self.offset


class Offsets(base.AdapterMethod):
    role = "norm"

    def label(self) -> str:
        return "offsets"

    def roles(self) -> frozenset[str]:
        return frozenset({self.role})

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        return Offset(target.out_features or 32)


class Nothing(base.ModelChange):
    def attach(self, language_model: nn.Module) -> Callable[[], None]:
        return lambda: None


class WholeModel(Offsets):
    def roles(self) -> frozenset[str]:
        return frozenset()

    def model_change(self, *args: object) -> base.ModelChange:
        return Nothing()


class OnBlocks(Offsets):
    role = "mlp"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Offsets, "offsets cannot be merged at layer model.layers.0.input_layernorm: a LlamaRMSNorm has no bias"),
        (OnBlocks, r"onblocks cannot be merged: layer model.layers.0.mlp \(LlamaMLP\) has no weight matrix"),
        (WholeModel, "wholemodel cannot be merged: it changes the model as a whole"),
    ],
)
def test_a_users_method_that_does_not_fit_the_layer_is_named(method: Any, message: str) -> None:
    model = tiny_llama()
    adapters = Adapters(model, {"all": method(base.Config())}, Router({"image": "all", "text": "all"}), seed=0)
    disturb(adapters.parameters())
    bare_BTV = bare(model)
    with pytest.raises(UserError, match=message):
        merge_into(model, adapters)
    assert torch.equal(bare(model), bare_BTV)


# ── Weights that are also another layer's


def test_a_tied_weight_is_not_merged_into() -> None:
    """Two adapters of one weight, or one of a weight that something else reads too."""
    model = tiny_llama()
    first, last = (block.mlp.down_proj for block in model.model.layers)
    last.weight = first.weight
    adapted = adapted_model(model, {"method": "lora", "rank": 2}, "agnostic")
    message = (
        r"lora cannot be merged at layer model\.layers\.0\.mlp\.down_proj: its weight is also that of "
        r"model\.layers\.1\.mlp\.down_proj"
    )
    before, kept = logits(adapted, embeds(), IDS_T), first.weight.clone()
    with pytest.raises(UserError, match=message):
        adapted.merge()
    assert torch.equal(first.weight, kept)
    assert torch.equal(logits(adapted, embeds(), IDS_T), before)
    adapted.detach()
    adapted_model(model, {"method": "lora", "rank": 2, "where": "A"}, "agnostic").merge()  # these are not tied


def test_a_layer_at_two_places_is_merged_once() -> None:
    """The same module: one adapter, which acts at both places."""
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    adapted = adapted_model(model, {"method": "lora", "rank": 2}, "agnostic")
    expected_BTV = logits(adapted, embeds(), IDS_T)
    merged = adapted.merge()
    torch.testing.assert_close(merged(inputs_embeds=embeds()).logits, expected_BTV, rtol=1e-4, atol=1e-4)
