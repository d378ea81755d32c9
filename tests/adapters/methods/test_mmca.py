"""Multi-modal causal attention: against loops in float64, against plain attention, and on other families.

Shapes: B rows, H heads, E features of a head, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from adapters.attach import Adapters
from adapters.methods import mmca
from adapters.methods.combination import combine
from adapters.methods.lora import LoRA
from adapters.methods.mmca import MMCA, MMCAConfig, MultiModalAttention
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.contexts import resolve_grouping
from harness.core.errors import UserError
from tests.support.models import tiny_gpt2, tiny_llama, tiny_neox, tiny_opt
from tests.support.three_contexts import CONTEXTS, embeds, logits

pytestmark = pytest.mark.quick

IDS = torch.tensor([[2, 0, 0, 1, 1, 0, 2, 2], [0, 0, 1, 0, 1, 2, 0, 2]])  # rows with different layouts
ATTENDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]]).bool()


FAMILIES = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2, "gpt_neox": tiny_neox}
each_family = pytest.mark.parametrize("make_model", FAMILIES.values(), ids=FAMILIES)


def attach(model: Any, config: MMCAConfig | None = None, contexts: tuple[str, ...] = CONTEXTS) -> Adapters:
    router = Router(dict.fromkeys(contexts))
    method = MMCA(config or MMCAConfig(text_contexts=("question", "answer")))
    adapters = Adapters(model, {}, router, seed=0, ungrouped=method)
    adapters.attach(model)
    return adapters


def by_loops(query: Tensor, key: Tensor, value: Tensor, text: tuple[int, ...], itself: bool) -> Tensor:
    """The definition, one query and one source at a time: (B, T, H, E)."""
    rows, heads, length, size = query.shape
    output = torch.zeros(rows, length, heads, size, dtype=query.dtype)
    for b in range(rows):
        source = [-1 if int(c) in text else int(c) for c in IDS[b]]
        for t in range(length):
            sources = sorted(set(source)) if source[t] == -1 else [source[t]]
            for one in sources:
                keys = [s for s in range(t + 1) if source[s] == one and ATTENDED[b, s]]
                if source[t] != -1 and itself:
                    keys = [s for s in keys if s == t]
                for h in range(heads if keys else 0):
                    of_head = h // (heads // key.shape[1])
                    scores = torch.stack([query[b, h, t] @ key[b, of_head, s] for s in keys]) / math.sqrt(size)
                    weight = scores.exp() / scores.exp().sum()
                    output[b, t, h] = output[b, t, h] + weight @ value[b, of_head, keys]
    return output


@pytest.mark.parametrize("non_text_attention", ["itself", "own_context"])
@pytest.mark.parametrize("text_contexts", [("question", "answer"), ("answer",)], ids=str)
def test_forward_and_gradients_equal_the_definition(non_text_attention: Any, text_contexts: Any) -> None:
    """float64, four query heads on two key heads."""
    router = Router(dict.fromkeys(CONTEXTS))
    config = MMCAConfig(text_contexts=text_contexts, non_text_attention=non_text_attention)
    module = nn.Identity().eval()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 8, 6, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    router.set_context_ids(IDS)
    mask = (torch.ones(8, 8).tril().bool() & ATTENDED[:, None])[:, None]
    weight = torch.randn(2, 8, 4, 6, generator=generator, dtype=torch.float64)
    text = tuple(CONTEXTS.index(context) for context in text_contexts)
    expected = by_loops(query, key, value, text, non_text_attention == "itself")
    expected_grads = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    mmca._ATTENTION_OF[module] = MultiModalAttention(config, router)
    try:
        for one in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
            found, weights = mmca._attention(module, query, key, value, one)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            found_grads = torch.autograd.grad((found * weight).sum(), (query, key, value))
            for grad, expected_grad in zip(found_grads, expected_grads, strict=True):
                torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)
    finally:
        del mmca._ATTENTION_OF[module]
    # The answer's last token sees all three contexts: as many sources, each with weights that sum to one.
    sources = 1 + len(set(range(3)) - set(text))
    assert weights[0, 0, -1].sum().item() == pytest.approx(sources)


@each_family
def test_text_alone_is_attended_to_as_always(make_model: Any) -> None:
    model, x_BTD = make_model(), embeds()
    mask_BT = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected_BTV = model(inputs_embeds=x_BTD, attention_mask=mask_BT, use_cache=False).logits
    adapters = attach(model)
    found_BTV = logits(model, adapters, x_BTD, torch.tensor([[1, 1, 2, 2, 1, 2, 2, 2]]), attention_mask=mask_BT)
    real_BT = mask_BT.bool()
    torch.testing.assert_close(found_BTV[real_BT], expected_BTV[real_BT], rtol=1e-4, atol=1e-5)
    with_image_BTV = logits(model, adapters, x_BTD, torch.tensor([[0, 0, 2, 0, 1, 2, 2, 2]]), attention_mask=mask_BT)
    assert not torch.allclose(with_image_BTV[0], expected_BTV[0], atol=1e-2)


def test_what_reaches_an_image_token_through_the_whole_model() -> None:
    ids_XT = torch.tensor([[2, 0, 0, 0, 2, 2, 0, 2]])
    for config, reached in (
        (MMCAConfig(text_contexts=("answer",)), set[int]()),
        (MMCAConfig(text_contexts=("answer",), non_text_attention="own_context"), {3, 6}),
    ):
        model = tiny_llama()
        adapters = attach(model, config)
        before_BTV = logits(model, adapters, embeds(), ids_XT)
        for changed, image_too in ((0, False), (2, True)):
            x_BTD = embeds()
            x_BTD[:, changed] += 1
            after_BTV = logits(model, adapters, x_BTD, ids_XT)
            differs = {t for t in range(8) if not torch.equal(before_BTV[:, t], after_BTV[:, t])}
            assert {t for t in differs if ids_XT[0, t] == 2} == ({0, 4, 5, 7} if changed == 0 else {4, 5, 7})
            assert {t for t in differs if ids_XT[0, t] == 0} - {changed} == (reached if image_too else set())


@pytest.mark.parametrize(("make_model", "num_beams"), [(tiny_llama, 1), (tiny_opt, 1), (tiny_llama, 3)])
@torch.no_grad()
def test_generation_from_left_padded_rows_equals_one_row_at_a_time(make_model: Any, num_beams: int) -> None:
    """With the KV cache, against each row alone without it."""
    model = make_model()
    adapters = attach(model)
    x_BTD = embeds()

    def generate(x: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        adapters.router.set_context_ids(ids)
        with layouts_while_generating(model, adapters.router, "answer"):
            tokens: Tensor = model.generate(
                inputs_embeds=x, attention_mask=mask, max_new_tokens=3, do_sample=False, num_beams=num_beams,
                eos_token_id=None, pad_token_id=0, **options,
            )  # fmt: skip
        return tokens

    together = generate(x_BTD, IDS, ATTENDED.long())
    for index, start in enumerate((0, 2)):
        row = slice(index, index + 1)
        alone = generate(x_BTD[row, start:], IDS[row, start:], torch.ones(1, 8 - start).long(), use_cache=False)
        assert torch.equal(together[row], alone)
    if num_beams == 1 and model.config.model_type == "llama":
        assert torch.equal(generate(x_BTD, IDS, ATTENDED.long(), cache_implementation="static"), together)


def test_detached_the_model_has_its_own_attention_again() -> None:
    for implementation in ("sdpa", "eager"):
        model = tiny_llama()
        model.set_attn_implementation(implementation)
        adapters = attach(model)
        assert model.config._attn_implementation == mmca.NAME
        adapters.detach()
        assert model.config._attn_implementation == implementation
        assert not set(model.modules()) & set(mmca._ATTENTION_OF)


def test_a_copy_of_an_adapted_model_is_refused_rather_than_routed_by_the_original() -> None:
    model = tiny_llama()
    adapters = attach(model)
    adapters.router.set_context_ids(IDS)
    with pytest.raises(RuntimeError, match="config object, or on the original of this copy"):
        copy.deepcopy(model)(inputs_embeds=embeds(), use_cache=False)


def test_dropout_falls_on_the_weights_in_training() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    adapters = attach(model)
    still_BTV = logits(model, adapters, embeds(), IDS)
    assert torch.equal(still_BTV, logits(model, adapters, embeds(), IDS))
    model.train()
    torch.manual_seed(0)
    dropped_BTV = logits(model, adapters, embeds(), IDS)
    assert not torch.allclose(dropped_BTV, still_BTV)
    assert not torch.equal(dropped_BTV, logits(model, adapters, embeds(), IDS))


def test_with_adapters_both_act() -> None:
    method_class = combine((MMCA, LoRA))
    method = method_class(method_class.Config(text_contexts=("question", "answer"), rank=2))
    assert method.label() == "MMCA + LoRA r=2"
    model = tiny_llama()
    router = Router(resolve_grouping("specific", CONTEXTS)[0])
    adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
    adapters.attach(model)
    # LoRA starts as nothing: at first it is MMCA alone.
    found_BTV = logits(model, adapters, embeds(), IDS)
    adapters.detach()
    alone = attach(model)
    assert torch.equal(logits(model, alone, embeds(), IDS), found_BTV)
    alone.detach()
    adapters.attach(model)
    router.set_context_ids(IDS)
    model(inputs_embeds=embeds(), use_cache=False).logits.square().sum().backward()
    for name, p in adapters.named_parameters():
        if name.endswith("lora_B"):
            assert p.grad is not None
            # What an image token asks for changes nothing, as it sees itself only.
            assert p.grad.any().item() is not ("q_proj" in name and "group_image" in name), name


def test_wrong_input() -> None:
    with pytest.raises(
        UserError, match="text_contexts: unknown context 'txt'; allowed: image, text; did you mean 'text'"
    ):
        attach(tiny_llama(), MMCAConfig(text_contexts=("txt",)), ("image", "text"))
    with pytest.raises(ValidationError, match=r"non_text_attention\n.*'itself' or 'own_context'"):
        MMCAConfig(non_text_attention="all")  # type: ignore[arg-type]
    module = nn.Identity()
    router = SimpleNamespace(layout_of=None)
    mmca._ATTENTION_OF[module] = router  # type: ignore[assignment]
    with pytest.raises(UserError, match="mmca cannot replace the attention of Identity, which needs softcap"):
        mmca._attention(module, *torch.ones(3, 1, 1, 1, 1), torch.ones(1).bool(), softcap=1.0)  # type: ignore[misc]
    del mmca._ATTENTION_OF[module]


def test_text_is_known_by_its_name_or_asked_for() -> None:
    for contexts in (("text", "image"), ("image", "text", "audio")):
        source_of = MultiModalAttention(MMCAConfig(), Router(dict.fromkeys(contexts))).source_of
        assert [context for context, source in zip(contexts, source_of, strict=True) if source == 0] == ["text"]
    with pytest.raises(
        UserError,
        match=r"text_contexts: found none, .*; allowed: a list of those that are text, of image, question, answer",
    ):
        MultiModalAttention(MMCAConfig(), Router(dict.fromkeys(CONTEXTS)))
