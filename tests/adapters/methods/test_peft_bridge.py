"""The bridge to the peft library: PEFT's own methods, attached and taken off without a trace.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import harness
from adapters.attach import Adapters, count_trainable
from adapters.methods.peft_bridge import PeftBridge, PeftBridgeConfig, make_config
from adapters.placement.router import Router
from adapters.registry import choose
from harness import UserError
from harness.core.cursor import Cursor
from harness.core.weight_decay import parameter_groups
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt

QV = {"target_modules": ["q_proj", "v_proj"]}
# Methods of every kind: additive, multiplicative, with shared projections, copies of a layer, shared layers.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, **QV},
    "LORA with dora": {"peft_type": "LORA", "r": 4, "use_dora": True, **QV},
    "IA3": {"peft_type": "IA3"},
    "LOHA": {"peft_type": "LOHA", "r": 2, **QV},
    "OFT": {"peft_type": "OFT", "oft_block_size": 4, **QV},
    "VERA": {"peft_type": "VERA", "r": 4, **QV},
    "LN_TUNING": {"peft_type": "LN_TUNING"},
    "LILY": {"peft_type": "LILY", **QV},
    "modules_to_save": {"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"], **QV},
}
each_method = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def build(model: Any, options: dict[str, Any], seed: int = 0) -> Adapters:
    router = Router({"image": None, "text": None})
    return Adapters(model, {}, router, seed, PeftBridge(PeftBridgeConfig(config=options)))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    logits_BTV: Tensor = model(inputs_embeds=embeds(), use_cache=False).logits
    return logits_BTV


def trace(model: nn.Module) -> dict[str, Any]:
    """All there is to a model: its modules, their attributes and hooks, its weights and which of them are trained."""
    modules = dict(model.named_modules())
    hooks = [name for name, m in modules.items() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    return {
        "modules": [(name, id(module), type(module)) for name, module in modules.items()],
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": hooks,
        "weights": save({name: tensor.contiguous() for name, tensor in model.state_dict(keep_vars=False).items()}),
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def paired(adapters: Adapters, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our trained parameters and those of PEFT's own model; names end alike."""
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = []
    for name, p in adapters.named_parameters():
        if p.requires_grad:
            end = "." + name.removeprefix("model_changes.peft.layers.").replace("/", ".")
            (their,) = (q for their_name, q in named.items() if their_name.endswith(end))
            pairs.append((p, their))
    assert len(pairs) == len(named)
    return pairs


# ── What it computes


@each_method
def test_it_computes_and_trains_as_the_peft_library_does(options: dict[str, Any]) -> None:
    """Steps of SGD from equal weights, against PEFT's own model."""
    model = tiny_llama()
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), make_config(options)).eval()
    adapters = build(model, options).eval()
    pairs = paired(adapters, theirs)
    disturb([p for p, _ in pairs])
    with torch.no_grad():
        for ours, their in pairs:
            their.copy_(ours)
    adapters.attach(model)
    losses: list[list[float]] = [[], []]
    for _ in range(3):
        for side, m in enumerate((model, theirs)):
            parameters = [pair[side] for pair in pairs]
            loss = m(inputs_embeds=embeds(), use_cache=False).logits.square().mean()
            gradients = torch.autograd.grad(loss, parameters)
            assert all(gradient.isfinite().all() for gradient in gradients)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.sub_(gradient, alpha=0.05)
            losses[side].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][1] < losses[0][0]


@each_method
def test_at_start_it_is_the_identity_and_afterwards_it_leaves_no_trace(options: dict[str, Any]) -> None:
    model = tiny_llama().train()  # also if everything is trained and a custom forward is installed
    model.requires_grad_(True)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.forward = layer.forward
    before, bare = trace(model), logits(model)
    random_state = torch.get_rng_state()
    adapters = build(model, options)
    assert trace(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    adapters.attach(model)
    assert torch.equal(logits(model), bare)
    disturb([p for p in adapters.parameters() if p.requires_grad])
    assert not torch.equal(logits(model), bare)
    adapters.detach()
    assert trace(model) == before
    assert torch.equal(logits(model), bare)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"modules_to_save"}))  # copies of weights decay as weights do
@torch.no_grad()
def test_weight_decay_alone_leads_no_further_from_the_base(name: str) -> None:
    model = tiny_llama()
    bare_BTV = logits(model)
    adapters = build(model, OPTIONS[name])
    adapters.attach(model)
    away = (logits(model) - bare_BTV).abs().max()
    for group in parameter_groups(adapters, 0.5):
        for p in group["params"]:
            p.mul_(1 - group["weight_decay"])
    assert (logits(model) - bare_BTV).abs().max() <= away + 1e-5


def test_the_base_keeps_its_names_and_its_own_hooks_fire_once() -> None:
    model = tiny_llama()
    names, calls = list(model.state_dict()), []
    adapters = build(model, OPTIONS["LORA"])
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda *_: calls.append(1))
    adapters.attach(model)
    logits(model)
    assert calls == [1]
    assert list(model.state_dict()) == names
    assert not any(p.requires_grad for p in model.parameters())


# Two more that read the base's weights while they are built.
COUNTED = {
    **OPTIONS,
    "BOFT": {"peft_type": "BOFT", "boft_block_size": 4, **QV},
    "SHIRA": {"peft_type": "SHIRA", "r": 4, **QV},
}


@pytest.mark.parametrize("options", COUNTED.values(), ids=COUNTED)
def test_parameters_are_the_adapters_alone_each_once_and_counted_without_the_base(options: dict[str, Any]) -> None:
    model = tiny_llama()
    adapters = build(model, options)
    with torch.device("meta"):
        bare = tiny_llama()
        empty = build(bare, options)
    assert all(p.is_meta for p in (*bare.parameters(), *empty.parameters()))
    assert not [name for name, p in bare.named_parameters() if p.requires_grad]
    theirs: Any = peft.get_peft_model(tiny_llama(), make_config(options))
    assert count_trainable(adapters) == count_trainable(empty) == theirs.get_nb_trainable_parameters()[0]
    base = {p.data_ptr() for p in model.parameters()}
    saved = [x.data_ptr() for x in adapters.state_dict().values()]
    assert not base & set(saved)
    assert len(set(saved)) == len(saved)


@pytest.mark.parametrize("make_model", [tiny_opt, tiny_gpt2])
def test_other_models_and_generation(make_model: Any) -> None:
    """PEFT's own default layers of each architecture; with a KV cache as without."""
    adapted = harness.adapt(make_model(), {"method": "peft", "config": {"peft_type": "LORA", "r": 2}}).eval()
    disturb(p for p in adapted.adapters.parameters())
    context_ids, given = torch.zeros(11, dtype=torch.long), {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    ids = [
        adapted.generate(
            inputs_embeds=embeds(), attention_mask=torch.ones(3, 11, dtype=torch.long), context_ids=context_ids,
            new_token_context="text", use_cache=use_cache, **given,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(ids[0], ids[1])
    assert ids[0].shape == (3, 5)


@each_method
def test_saved_and_loaded_onto_a_fresh_base_it_computes_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    adapted = harness.adapt(tiny_llama(), {"method": "peft", "config": options}, seed=5).eval()
    disturb([p for p in adapted.adapters.parameters() if p.requires_grad])
    adapted.save(tmp_path)
    loaded = harness.load_adapter(tiny_llama(), tmp_path).eval()
    ids = torch.zeros(11, dtype=torch.long)
    with torch.no_grad():
        expected_BTV, found_BTV = (m(inputs_embeds=embeds(), context_ids=ids).logits for m in (adapted, loaded))
    assert torch.equal(found_BTV, expected_BTV)
    assert not torch.equal(expected_BTV, logits(tiny_llama()))


def test_dropout_and_training_mode_follow_the_adapted_model() -> None:
    options = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.5, **QV}
    adapted = harness.adapt(tiny_llama(), {"method": "peft", "config": options})
    disturb(adapted.adapters.parameters())
    ids = torch.zeros(11, dtype=torch.long)
    for training in (True, False):
        adapted.train(training)
        first, second = (adapted(inputs_embeds=embeds(), context_ids=ids).logits for _ in range(2))
        assert torch.equal(first, second) is not training


def test_on_a_bf16_base_the_adapters_are_fp32() -> None:
    model = tiny_llama().bfloat16()
    adapters = build(model, OPTIONS["LORA"])
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    adapters.attach(model)
    assert model(inputs_embeds=embeds().bfloat16(), use_cache=False).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        adapters = build(model, OPTIONS["LORA"])
        disturb(adapters.parameters())
        adapters.attach(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        x_BTD = embeds().requires_grad_()
        model(inputs_embeds=x_BTD, use_cache=False).logits.square().mean().backward()
        gradients.append([x_BTD.grad, *(p.grad for p in adapters.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


# ── What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "config.peft_type must name one of PEFT's methods; allowed: .*LORA"),
        ({"peft_type": "lora"}, "unknown peft_type 'lora'.*did you mean 'LORA'"),
        ({"peft_type": "LOHAA"}, "did you mean 'LOHA'"),
        ({"peft_type": "LORA", "rr": 8}, "LORA has no option 'rr'; allowed: .*did you mean 'r'"),
        ({"peft_type": "LORA", "r": "many"}, "LORA: r='many'.*integer"),
        ({"peft_type": "LORA", "bias": "all"}, "bias='all' cannot be used here.*bitfit"),
        ({"peft_type": "LORA", "inference_mode": True}, "inference_mode=True cannot be used"),
        ({"peft_type": "LORA", "layers_pattern": "h"}, "LORA: .*layers_to_transform"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING cannot be used here: .*soft_prompt"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING cannot be used here: .*soft_prompt"),
        ({"peft_type": "P_TUNING"}, "P_TUNING cannot be used here: .*soft_prompt"),
        ({"peft_type": "ADALORA"}, "ADALORA cannot be used here: it does more than add layers"),
        ({"peft_type": "XLORA"}, "XLORA cannot be used here: it does more than add layers"),
    ],
)
def test_options_that_cannot_be_are_refused_before_any_computation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^spec\.config: peft: .*{message}"):
        choose({"method": "peft", "config": options}, Cursor(path=("spec",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "LORA", "target_modules": ["query"]}, "Target modules .*query.* not found"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa", **QV}, "changes the weights of the frozen base"),
        ({"peft_type": "LORA", "init_lora_weights": "olora", **QV}, "changes the weights of the frozen base"),
        ({"peft_type": "MISS", "r": 64, **QV}, "MISS on this model: ValueError: .*less than or equal to in_features"),
        ({"peft_type": "LORA", "modules_to_save": ["model"], **QV}, "No modules were targeted"),
    ],
)
def test_what_does_not_suit_the_model_is_an_error_and_leaves_it_as_it_was(
    options: dict[str, Any], message: str
) -> None:
    model = tiny_llama()
    before = trace(model)
    with pytest.raises(UserError, match=message):
        build(model, options)
    assert trace(model) == before


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'context-peft-harness\[peft\]'"):
        choose({"method": "peft", "config": {"peft_type": "LORA"}}, Cursor(path=("spec",)))
    with pytest.raises(UserError, match=r"pip install 'context-peft-harness\[peft\]'"):
        harness.adapt(tiny_llama(), {"method": "peft"})


def test_labels() -> None:
    labels = [PeftBridge(PeftBridgeConfig(config=options)).label() for options in list(OPTIONS.values())[:3]]
    assert labels == ["peft LORA r=4", "peft LORA r=4", "peft IA3"]
    assert PeftBridge(PeftBridgeConfig()).label() == "peft LORA r=8"
