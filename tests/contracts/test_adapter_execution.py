"""Ways to run a model that ``harness check`` does not try: every registered adapter method computes the same.

Shapes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.attach import Adapters
from adapters.placement.generation import layouts_while_generating
from harness.core.registry import Entry
from tests.support.adapters import disturb
from tests.support.registered import CONTEXTS, adapters_of, drawn_llama, every_method, every_plugin_and, method_of

IMAGE, TEXT = 0, 1
# One row per kind of layout: two long segments, interleaved, image last, and text alone.
ROWS = torch.tensor(
    [
        [1, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        [1, 0, 1, 0, 0, 1, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
LENGTH = ROWS.shape[1]
# Each way to compute once: low rank, scale, norm of the weight, block, groups that join, attention, prompt, PEFT.
KINDS = ("lora", "ia3", "dora", "bottleneck", "moka", "mmca", "soft_prompt", "peft")


def adapted(entry: Entry, grouping: Any = "specific", layers: int = 2) -> tuple[Any, Adapters]:
    """A tiny model with a disturbed adapter."""
    model = drawn_llama()
    model.model.layers = model.model.layers[:layers]
    adapters = adapters_of(entry, model, grouping)
    disturb(adapters.parameters(), scale=0.2)
    adapters.attach(model)
    adapters.eval()
    return model, adapters


def embeds(rows: int = len(ROWS), length: int = LENGTH) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1))


def logits(model: Any, adapters: Adapters, x_BTD: Tensor, ids_XT: Tensor, **options: Any) -> Tensor:
    adapters.router.set_context_ids(ids_XT)
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False, **options).logits
    return logits_BTV


def gradients(adapters: Adapters, loss: Tensor) -> dict[str, Tensor]:
    adapters.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None}


def weighted(logits_BTV: Tensor) -> Tensor:
    """A loss in which every position counts differently."""
    weight = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(5))
    return (logits_BTV.float() * weight).sum()


def adapters_train(adapters: Adapters) -> bool:
    return any(p.requires_grad for p in adapters.parameters())


@every_method
@torch.no_grad()
def test_specific_with_equal_weights_is_agnostic_in_bf16(entry: Entry) -> None:
    """2e-2 of the largest logit, as the two may join their products in another order."""
    if method_of(entry).joins_groups or not method_of(entry).grouped:
        pytest.skip("its groups act on one another, or it has none")
    model, one = adapted(entry, "agnostic")
    model.to(torch.bfloat16), one.to(torch.bfloat16)
    x_BTD = embeds().to(torch.bfloat16)
    expected_BTV = logits(model, one, x_BTD, ROWS).float()
    one.detach()
    two, weights = adapters_of(entry, model, "specific").to(torch.bfloat16), one.state_dict()
    names = {n: n.replace("group_image", "group_all").replace("group_text", "group_all") for n in two.state_dict()}
    two.load_state_dict({name: weights[other] for name, other in names.items()})
    two.attach(model)
    found_BTV = logits(model, two, x_BTD, ROWS).float()
    assert ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item() < 2e-2


@pytest.mark.slow
@every_method
def test_reentrant_activation_checkpointing_gives_the_same_gradients(entry: Entry) -> None:
    model, adapters = adapted(entry)
    model.train()
    calls: list[None] = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(None))

    def run() -> tuple[dict[str, Tensor], Tensor]:
        x_BTD = embeds().requires_grad_()  # as the projector's output does
        grads = gradients(adapters, weighted(logits(model, adapters, x_BTD, ROWS)))
        assert x_BTD.grad is not None
        return grads, x_BTD.grad

    plain, plain_x_BTD = run()
    assert len(calls) == 1
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    found, found_x_BTD = run()
    assert len(calls) == 3, "nothing was recomputed"
    torch.testing.assert_close(found_x_BTD, plain_x_BTD, rtol=1e-5, atol=1e-5)
    assert list(found) == list(plain)
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5 * grad.abs().max().item() + 1e-7)


@every_plugin_and(*KINDS)
@torch.no_grad()
def test_sdpa_and_eager_attention_agree(entry: Entry) -> None:
    model, adapters = adapted(entry)
    found_BTV = logits(model, adapters, embeds(), ROWS)
    adapters.detach()
    model.set_attn_implementation("eager")
    adapters.attach(model)
    torch.testing.assert_close(logits(model, adapters, embeds(), ROWS), found_BTV, rtol=1e-4, atol=1e-4)


# Up to 24 s each.
@every_plugin_and("lora")
@pytest.mark.e2e
def test_a_compiled_model_computes_the_same(entry: Entry) -> None:
    """Captured by dynamo and AOT autograd, run by their eager backend: what needs no compiler on the machine."""
    torch._dynamo.reset()
    model, adapters = adapted(entry, layers=1)
    expected_BTV = logits(model, adapters, embeds(), ROWS)
    expected = gradients(adapters, weighted(expected_BTV)) if adapters_train(adapters) else {}
    compiled: Callable[..., Any] = torch.compile(model, backend="aot_eager", dynamic=False)
    found_BTV = logits(compiled, adapters, embeds(), ROWS)
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    found = gradients(adapters, weighted(found_BTV)) if expected else {}
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-3 * grad.abs().max().item() + 1e-6)
    # Another layout of the same shape is not served by what was compiled for the first.
    other_BTV = logits(compiled, adapters, embeds(), ROWS.flip(0))
    torch.testing.assert_close(other_BTV, logits(model, adapters, embeds(), ROWS.flip(0)), rtol=1e-4, atol=1e-4)


@every_plugin_and(*KINDS)
@torch.no_grad()
def test_autocast_is_close_to_full_precision(entry: Entry) -> None:
    """bf16 has 8 bits: 5 % of the largest logit over two layers."""
    model, adapters = adapted(entry)
    expected_BTV = logits(model, adapters, embeds(), ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_BTV = logits(model, adapters, embeds(), ROWS).float()
    assert not torch.equal(found_BTV, expected_BTV)
    assert ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item() < 5e-2


@every_plugin_and(*KINDS)
@torch.no_grad()
def test_generation_of_beams_with_a_cache_equals_full_recomputation(entry: Entry) -> None:
    """Rows of different layouts."""
    model, adapters = adapted(entry)
    # Tokens: with `inputs_embeds`, generate uses a cache even with use_cache=False (transformers 5.23).
    ids_BT = torch.randint(model.config.vocab_size, ROWS.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for use_cache in (True, False):
        adapters.router.set_context_ids(ROWS)
        with layouts_while_generating(model, adapters.router, CONTEXTS[TEXT]):
            found.append(
                model.generate(
                    input_ids=ids_BT, attention_mask=torch.ones(ROWS.shape, dtype=torch.long), max_new_tokens=6,
                    do_sample=False, num_beams=3, use_cache=use_cache, eos_token_id=None, pad_token_id=0,
                    output_scores=True, return_dict_in_generate=True,
                )
            )  # fmt: skip
    assert torch.equal(found[0].sequences, found[1].sequences)
    for cached_BV, plain_BV in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(cached_BV, plain_BV, rtol=1e-3, atol=1e-3)
