"""Adapted layers that read one input are computed together, with the results of apart; detaching restores the layer."""

from __future__ import annotations

import copy
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harness
from adapters.attach import AdaptedLayer
from adapters.placement.own_forward import OwnForward, is_bare_linear
from tests.support.models import tiny_llama

IDS_T = torch.tensor([0] * 5 + [1] * 6)
SPECS: dict[str, Any] = {
    "agnostic": ({"method": "lora", "rank": 4}, "agnostic"),
    "specific": ({"method": "lora", "rank": 4}, "specific"),
    "many columns": ({"method": "lora", "rank": 16}, "specific"),
    "pissa": ({"method": "lora", "rank": 2, "init_lora_weights": "pissa"}, "specific"),
    "before another": ({"method": "lora+bitfit"}, "specific"),
    "after another": ({"method": "bitfit+lora"}, "specific"),
    "q and v alone": ({"method": "lora", "where": ["q", "v"]}, "specific"),
}


def adapted_of(name: str) -> Any:
    spec, grouping = SPECS[name]
    adapted = harness.adapt(tiny_llama(), spec, contexts=("image", "text"), grouping=grouping)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapted


def gradients(adapted: Any, together: bool) -> dict[str, Tensor]:
    """Of the input and of all adapters; and the logits."""
    adapted.adapters.compute_together(together)
    width = adapted.base_model.config.hidden_size
    generator = torch.Generator().manual_seed(2)
    dtype = next(adapted.base_model.parameters()).dtype
    x_BTD = torch.randn(40, len(IDS_T), width, generator=generator).to(dtype).requires_grad_()
    adapted.zero_grad()
    logits_BTV = adapted(inputs_embeds=x_BTD, context_ids=IDS_T, use_cache=False).logits
    logits_BTV.log_softmax(-1)[..., 0].sum().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    return {"input": x_BTD.grad, "logits": logits_BTV.detach(), **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", SPECS)
def test_together_as_apart(name: str) -> None:
    """In fp32, each against apart in float64: 1e-5 of the largest number."""
    adapted = adapted_of(name)
    expected = gradients(copy.deepcopy(adapted).double(), together=False)
    for together in (True, False):
        found = gradients(adapted, together)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), (key, together)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each call that computed some together."""
    from adapters.methods import lora

    calls: list[int] = []
    plain = lora.linear

    def counted(x_BTI: Tensor, parts: Any, *args: Any) -> Any:
        calls.append(len(parts))
        return plain(x_BTI, parts, *args)

    monkeypatch.setattr(lora, "linear", counted)
    return calls


def test_layers_of_one_input_are_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, calls = adapted_of("specific"), calls_of(monkeypatch)
    gradients(adapted, together=True)
    blocks = adapted.base_model.config.num_hidden_layers
    assert calls == [3, 1, 2, 1] * blocks
    calls.clear()
    gradients(adapted, together=False)
    assert calls == []


def test_a_layer_that_reads_something_else_is_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pre-hook gives k another tensor: the numbers are right, and from the next block on nothing is wasted."""
    adapted = adapted_of("specific")
    for block in adapted.base_model.model.layers:
        block.self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    expected, calls = gradients(adapted, together=False), calls_of(monkeypatch)
    for computes_all in (True, False):
        found = gradients(adapted, together=True)
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key
        assert (3 in calls) == computes_all
        calls.clear()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["specific", "before another"])
@pytest.mark.parametrize("checkpointed", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_one_of_the_layers_in_a_checkpointed_function(checkpointed: str, name: str, reentrant: bool) -> None:
    """Its output is not that of a layer outside, which would have no gradient, or one that backward cannot repeat."""
    adapted = adapted_of(name)
    expected = gradients(adapted, together=False)
    for block in adapted.base_model.model.layers:
        for module in (block.self_attn, block.mlp):
            layer = getattr(module, checkpointed, None)
            if layer is not None:
                own = layer.forward
                layer.forward = partial(checkpoint, own, use_reentrant=reentrant)
    for _ in range(2):
        found = gradients(adapted, together=True)
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


def test_a_pass_keeps_no_input_of_layers_that_have_run() -> None:
    adapted, alive = adapted_of("specific"), []
    inputs: list[Any] = []

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        alive.append(sum(kept() is not None for kept in inputs))
        inputs.append(weakref.ref(args[0]))

    for block in adapted.base_model.model.layers:
        block.self_attn.q_proj.register_forward_pre_hook(count)
    with torch.no_grad():
        adapted(input_ids=IDS_T[None], context_ids=IDS_T, use_cache=False)
    assert alive == [0] * adapted.base_model.config.num_hidden_layers


def forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_detaching_gives_each_layer_its_forward_back() -> None:
    adapted = adapted_of("specific")
    twin = copy.deepcopy(adapted)
    assert len(forwards(adapted.base_model)) == 7 * adapted.base_model.config.num_hidden_layers
    base = adapted.detach()
    assert forwards(base) == []
    assert forwards(twin.base_model)
    q_proj = twin.base_model.model.layers[0].self_attn.q_proj
    assert vars(q_proj)["forward"].__self__.layer is q_proj, "the copy computes the original's layer"
    layers = [layer for layer in twin.adapters.layers.values() if isinstance(layer, AdaptedLayer)]
    assert all(layer.one_input is not None for layer in layers)
    assert layers[0].one_input.parts[0][0] is q_proj  # type: ignore[union-attr]


def test_a_forward_that_something_else_has_wrapped_is_the_layers_own_again() -> None:
    layer = nn.Linear(3, 2)
    own = OwnForward(layer, lambda x: x * 0)
    wrapped = layer.forward
    layer.forward = lambda x: wrapped(x) + 1  # type: ignore[method-assign]
    x_BI = torch.randn(4, 3)
    assert torch.equal(layer(x_BI), x_BI * 0 + 1)
    own.remove()
    torch.testing.assert_close(layer(x_BI), nn.functional.linear(x_BI, layer.weight, layer.bias) + 1)


def test_a_layer_that_is_more_than_linear_keeps_its_forward() -> None:
    class Other(nn.Linear):
        pass

    hooked = nn.Linear(3, 2)
    hooked.register_forward_hook(lambda *_: None)
    offloaded = nn.Linear(3, 2)
    offloaded.forward = lambda x: x  # type: ignore[method-assign]
    assert is_bare_linear(nn.Linear(3, 2))
    assert not any(is_bare_linear(layer) for layer in (Other(3, 2), hooked, offloaded, nn.ReLU()))
