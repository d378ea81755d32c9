"""Every known family of language models: its layers have the roles of the table, and can be adapted.

Shapes: B rows, T positions, H heads, D outputs of one head, I input and O output features of a layer, W width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_utils import AttentionInterface

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.generation import layouts_while_generating
from adapters.placement.roles import FAMILIES, ROLES, Target, find_targets
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from tests.support.adapters import BITFIT, IA3_, LORA, TWO_LONG, disturb, embeds
from tests.support.families import _GROUPED, OPTIONS, logits, tiny
from tests.support.tiers import some_fast

GATED = sorted(set(FAMILIES) - {"opt", "gpt2", "gpt_neox"})
# They compute as Llama, Gemma 2 or GLM does, with other norms or biases; test_each_place covers those anyway.
LIKE_OTHERS = ("mistral", "qwen3", "smollm3", "gemma", "gemma3_text", "glm4")
each_family = some_fast("family", {name: name for name in sorted(FAMILIES)}, slow=LIKE_OTHERS)


def attach(model: Any, method: AdapterMethod, grouping: Any = "specific") -> Adapters:
    """Attached, at its initialisation."""
    router = Router(resolve_grouping(grouping, ("image", "text"))[0])
    router.set_layout(TWO_LONG)
    adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
    adapters.to(next(model.parameters()).dtype).attach(model)
    return adapters


# ── Which layers: written out explicitly; "layer:role" is a part of a fused layer

_LLAMA_A = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
_LLAMA_F = "mlp.gate_proj mlp.up_proj mlp.down_proj"
_SPLIT = (_LLAMA_A, "self_attn.k_proj self_attn.v_proj", "mlp.down_proj")  # A; IA3's A and F
# family → blocks, LoRA's A, IA3's A, IA3's F, LoRA's F, norms of a block, the last norm
LAYERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"),
        ("model.layers", *_SPLIT, _LLAMA_F, "input_layernorm post_attention_layernorm", "model.norm"),
    ),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"),
        ("model.layers", *_SPLIT, _LLAMA_F,
         "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm", "model.norm"),
    ),
    "glm": ("model.layers", *_SPLIT, "mlp.gate_up_proj mlp.down_proj", "input_layernorm post_attention_layernorm",
            "model.norm"),
    "glm4": ("model.layers", *_SPLIT, "mlp.gate_up_proj mlp.down_proj",
             "input_layernorm post_attention_layernorm post_self_attn_layernorm post_mlp_layernorm", "model.norm"),
    "phi3": ("model.layers", "self_attn.qkv_proj self_attn.o_proj", "self_attn.qkv_proj:k self_attn.qkv_proj:v",
             "mlp.down_proj", "mlp.gate_up_proj mlp.down_proj", "input_layernorm post_attention_layernorm",
             "model.norm"),
    "opt": ("model.decoder.layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj",
            "self_attn.k_proj self_attn.v_proj", "fc2", "fc1 fc2", "self_attn_layer_norm final_layer_norm",
            "model.decoder.final_layer_norm"),
    "gpt2": ("transformer.h", "attn.c_attn attn.c_proj", "attn.c_attn:k attn.c_attn:v", "mlp.c_proj",
             "mlp.c_fc mlp.c_proj", "ln_1 ln_2", "transformer.ln_f"),
    "gpt_neox": ("gpt_neox.layers", "attention.query_key_value attention.dense",
                 "attention.query_key_value:k attention.query_key_value:v", "mlp.dense_4h_to_h",
                 "mlp.dense_h_to_4h mlp.dense_4h_to_h", "input_layernorm post_attention_layernorm",
                 "gpt_neox.final_layer_norm"),
}  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_place_is_exactly_these_layers(family: str) -> None:
    blocks, attention, ia3_attention, ia3_feed_forward, feed_forward, norms, last = LAYERS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OPTIONS[family]))

    def keys(*roles: str) -> list[str]:
        return sorted(target.key.replace("/", ".") for target in find_targets(model, frozenset(roles)))

    def both(inside: str, *others: str) -> list[str]:
        return sorted([f"{blocks}.{n}.{path}" for n in (0, 1) for path in inside.split()] + list(others))

    assert keys("q", "k", "v", "o") == both(attention)
    assert keys("gate", "up", "down") == both(feed_forward)
    assert keys("q", "k", "v", "o", "gate", "up", "down") == both(f"{attention} {feed_forward}")
    assert keys("k", "v", "down") == both(f"{ia3_attention} {ia3_feed_forward}")
    assert keys("norm") == both(norms, last)
    if family != "opt":  # whose feed-forward layers are not in a module of their own
        assert keys("mlp") == both("mlp")


# ── Every role is what it says: against attention's and the feed-forward block's own tensors, float64


@contextmanager
def watched_attention(seen: list[tuple[Any, ...]]) -> Iterator[None]:
    """Note module, queries, keys, values (B, H, T, D) and result (B, T, H, D) of every attention."""
    original = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        attention = original(self, name, default)

        def watched(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = attention(module, q, k, v, *args, **kwargs)
            seen.append((module, {"q": q, "k": k, "v": v}, result[0]))
            return result

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionInterface, "get_interface", get_interface)
        yield


def by_hand(target: Target, x_BTI: Tensor, adapters: Adapters) -> Tensor:
    """A layer's or part's output from its weight and its two biases."""
    bias = getattr(target.layer, "bias", None)
    y_BTO = x_BTI @ target.weight().T
    if bias is not None:
        y_BTO = y_BTO + (bias if target.rows is None else bias[list(target.rows)])
    if target.key in adapters.layers:
        y_BTO = y_BTO + adapters.get_parameter(f"layers.{target.key}.changes.bitfit.deltas.group_all.bias")
    return y_BTO


def first_targets(model: Any, family: str) -> dict[str, Target]:
    """Role → its layer or part in the first block; looked up one by one, so that fused layers are split."""
    roles = ["q", "k", "v", "o", "up", "down", *(["gate"] if family in GATED else [])]
    return {role: find_targets(model, frozenset({role}))[0] for role in roles}


def inputs_of(model: Any, targets: dict[str, Target]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for role, target in targets.items():
        assert target.layer is not None
        target.layer.register_forward_hook(lambda _m, args, _y, role=role: seen.update({role: args[0]}))
    return seen


@each_family
@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_q_k_and_v_are_attentions_own(family: str, role: str) -> None:
    """A bias on one role's part moves that tensor of attention, each entry by its own bias, and neither other."""
    model, before, after = tiny(family, torch.float64), [], []
    targets = first_targets(model, family)
    assert (targets[role].rows is not None) is (family in {"gpt2", "gpt_neox", "phi3"})
    with watched_attention(before):
        logits(model)
    adapters = attach(model, BitFit(BitFitConfig(where=(role,))), "agnostic")  # type: ignore[arg-type]
    disturb(adapters.parameters())
    seen = inputs_of(model, targets)
    with watched_attention(after):
        logits(model)
    module, found = after[0][:2]
    for other in {"q", "k", "v"} - {role}:
        assert torch.equal(found[other], before[0][1][other])
    y_BTO = by_hand(targets[role], seen[role], adapters)
    expected_BHTD = y_BTO.unflatten(-1, (-1, found[role].shape[-1])).transpose(1, 2)
    if role != "v" and hasattr(module, f"{role}_norm"):
        expected_BHTD = getattr(module, f"{role}_norm")(expected_BHTD)
    if (family, role) == ("opt", "q"):
        expected_BHTD = expected_BHTD * module.scaling
    if role != "v":  # rotary embeddings turn nothing at the first position
        found[role], expected_BHTD = found[role][:, :, :1], expected_BHTD[:, :, :1]
    # 1e-6 for the norms of queries and keys, which compute in float32.
    torch.testing.assert_close(found[role], expected_BHTD, rtol=1e-6, atol=1e-6)
    # o is what reads attention's result.
    assert torch.equal(seen["o"], after[0][2].reshape(seen["o"].shape))


@each_family
def test_gate_and_up_are_what_the_activation_takes_them_for(family: str) -> None:
    for role in ("gate", "up") if family in GATED else ("up",):
        check_what_the_activation_takes(family, role)


def check_what_the_activation_takes(family: str, role: str) -> None:
    model = tiny(family, torch.float64)
    targets = first_targets(model, family)
    adapters = attach(model, BitFit(BitFitConfig(where=(role,))), "agnostic")  # type: ignore[arg-type]
    disturb(adapters.parameters())
    seen = inputs_of(model, targets)
    logits(model)
    config = model.config
    name = next(n for n in ("hidden_act", "activation_function", "hidden_activation") if getattr(config, n, None))
    activation = ACT2FN[getattr(config, name)]
    up = by_hand(targets["up"], seen["up"], adapters)
    expected = activation(by_hand(targets["gate"], seen["gate"], adapters)) * up if family in GATED else activation(up)
    torch.testing.assert_close(seen["down"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [LoRA(LoRAConfig(rank=3, alpha=5.0, where=("q", "v", "gate", "o"))), IA3_, BitFit(BitFitConfig(where=("k", "up")))],
    ids=lambda m: m.name,
)
def test_parts_of_fused_layers_learn_as_layers_of_their_own_do(method: AdapterMethod) -> None:
    """Phi-3 is a Llama with q, k, v and gate, up fused: with the same weights, the same logits and gradients."""
    fused = tiny("phi3", torch.float64)
    llama = (
        LlamaForCausalLM(AutoConfig.for_model("llama", **_GROUPED, rms_norm_eps=1e-5))
        .eval()
        .requires_grad_(False)
        .double()
    )
    weights = {}
    for name, x in fused.state_dict().items():
        if "qkv_proj" in name:
            parts = zip("qkv", x.split([32, 16, 16]), strict=True)
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), x.chunk(2), strict=True)
        else:
            parts = iter([("", x)])
        weights |= {re.sub("qkv_proj|gate_up_proj", f"{part}_proj", name): rows for part, rows in parts}
    llama.load_state_dict(weights)
    found, expected = attach(fused, method), attach(llama, method)
    disturb(found.parameters())
    names = {name: re.sub(r"(?:qkv|gate_up)_proj:(\w+)", r"\1_proj", name) for name, _ in found.named_parameters()}
    expected.load_state_dict({names[name]: x for name, x in found.state_dict().items()})
    torch.testing.assert_close(logits(fused), logits(llama), rtol=1e-12, atol=1e-12)
    for model in (fused, llama):
        logits(model).square().sum().backward()
    for name, p in found.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected.get_parameter(names[name]).grad, rtol=1e-9, atol=1e-9)


# ── Every simple method on every family

SOME = {
    "lora": LORA,
    "bitfit": BITFIT,
    "ia3": IA3_,
    "lora on some": LoRA(LoRAConfig(rank=2, where=("q", "v", "up"))),
    "bitfit on some": BitFit(BitFitConfig(where=("k", "up", "down"))),
}


@each_family
@pytest.mark.parametrize("method", SOME.values(), ids=SOME)
def test_it_attaches_learns_and_leaves(family: str, method: AdapterMethod) -> None:
    model = tiny(family)
    with torch.no_grad():
        bare_BTV = logits(model)
        adapters = attach(model, method)
        assert torch.equal(logits(model), bare_BTV)
        disturb(adapters.parameters())
        assert (logits(model) != bare_BTV).any(dim=-1).all()
    logits(model).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())
    adapters.detach()
    with torch.no_grad():
        assert torch.equal(logits(model), bare_BTV)


@each_family
def test_layers_of_every_role_take_one_tensor_and_give_one(family: str) -> None:
    """What the hooks need. Of the features that the target names, so that a norm and a whole block are right too."""
    model = tiny(family)
    called = []

    def look(target: Target) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            assert not kwargs
            assert [x.shape[-1] for x in args] == [target.in_features]
            assert y.shape == (*args[0].shape[:-1], target.out_features)
            called.append(target.key)

        return hook

    targets = find_targets(model, ROLES)
    for target in targets:
        assert target.layer is not None
        target.layer.register_forward_hook(look(target), with_kwargs=True)
    logits(model)
    assert sorted(called) == sorted(target.key for target in targets)


@each_family
def test_embeddings_given_are_embeddings_looked_up(family: str) -> None:
    """Gemma scales its embeddings, in the embedding layer: embeddings next to projected features are scaled already."""
    model, ids_BT = tiny(family), torch.arange(3, 14)[None]
    embeds_BTW = model.get_input_embeddings()(ids_BT)
    assert torch.equal(model(ids_BT).logits, model(inputs_embeds=embeds_BTW).logits)


@each_family
def test_generating_with_a_cache_is_computing_everything_again(family: str) -> None:
    model, x_BTW = tiny(family, torch.float64), embeds().double()
    adapters = attach(model, LoRA(LoRAConfig(rank=2, where=("q", "v", "up", "down"))))
    disturb(adapters.parameters())
    new = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), layouts_while_generating(model, adapters.router, "text"):
        mask_BT = torch.ones(x_BTW.shape[:2], dtype=torch.long)
        out = model.generate(
            inputs_embeds=x_BTW, attention_mask=mask_BT, output_logits=True, return_dict_in_generate=True, **new
        )
    tail_BTW = model.get_input_embeddings()(out.sequences[:, :3])
    adapters.router.set_context_ids(torch.tensor([[1] + [0] * 5 + [1] * 8]))  # TWO_LONG, then text
    again_BTV = model(inputs_embeds=torch.cat([x_BTW, tail_BTW], dim=1), use_cache=False).logits[:, -4:]
    # generate rounds its logits to float32.
    torch.testing.assert_close(torch.stack(out.logits, dim=1), again_BTV.float(), rtol=1e-5, atol=1e-5)
