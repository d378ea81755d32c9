"""The model: its likelihood against Hugging Face's own loss, its generation against full recomputation.

Shapes: B rows, P prefix positions, T target positions, N encoder tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.router import Layout, Router
from harness.core.contexts import Segment, resolve_grouping
from harness.core.errors import UserError
from harness.model.batch import IGNORED, Batch
from harness.model.context_model import ContextModel
from tests.support.adapters import adapt, disturb, embeds
from tests.support.batches import batch_of, model_of, prompt_of, ungroup
from tests.support.models import each_model, tiny_llama

pytestmark = pytest.mark.quick

EOS, N = 2, 4
METHODS: dict[str, AdapterMethod] = {
    "lora": LoRA(LoRAConfig(rank=3)),
    "bitfit": BitFit(BitFitConfig()),
    "ia3": IA3(IA3Config()),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def context_model(language_model: Any, method: AdapterMethod = METHODS["lora"], dropout: float = 0.0) -> ContextModel:
    """Specific adapters with random parameters."""
    router = Router(resolve_grouping("specific", ("image", "text"))[0])
    adapters = Adapters(language_model, dict.fromkeys(router.groups, method), router, seed=0)
    disturb(adapters.parameters())
    adapters.attach(language_model)
    torch.manual_seed(3)
    model = model_of(language_model, {"image": 20}, adapters, router, dropout)
    with torch.no_grad():  # so that attention differs between tokens
        model.projectors["image"].layers[1].weight *= 8  # type: ignore[operator, union-attr, index]
    return model.eval()


def features_of(rows: int) -> Tensor:
    return torch.randn(rows, N, 20, generator=torch.Generator().manual_seed(4))


def targets_of(*targets: list[int]) -> Tensor:
    rows = [torch.tensor(target) for target in targets]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def row(features_BND: Tensor, targets_BT: Tensor, index: int) -> Batch:
    """One row without its padding."""
    target_T = targets_BT[index]
    return batch_of({"image": features_BND[index : index + 1]}, target_T[target_T != IGNORED][None])


TARGETS = targets_of([5, 9, 33, EOS], [7, EOS], [11, 60, 41, 3, 3, 8, EOS])
FEATURES = features_of(len(TARGETS))
BATCH = batch_of({"image": FEATURES}, TARGETS)
PROMPT = prompt_of({"image": FEATURES})


@each_model
@each_method
@torch.no_grad()
def test_likelihood_equals_hugging_faces_own_loss_over_the_whole_sequence(
    make_model: Any, method: AdapterMethod
) -> None:
    """No padding, no dropped positions: every row alone, with all its targets read, labels on targets only."""
    model = context_model(make_model(), method)
    nll_B, tokens_B = model(BATCH)
    assert tokens_B.tolist() == [4, 2, 7]
    for index, nll in enumerate(nll_B):
        target_1T = TARGETS[index][TARGETS[index] != IGNORED][None]
        prefix_1PD = model.embed(prompt_of({"image": FEATURES[index : index + 1]}))
        embeds_1SD = torch.cat([prefix_1PD, model.language_model.get_input_embeddings()(target_1T)], dim=1)
        labels_1S = torch.cat([torch.full((1, 1 + N), IGNORED), target_1T], dim=1)
        length = embeds_1SD.shape[1]
        model.router.set_layout([Segment(0, 1, "text"), Segment(1, 5, "image"), Segment(5, length, "text")])
        output = model.language_model(
            inputs_embeds=embeds_1SD, attention_mask=torch.ones(1, length, dtype=torch.long), labels=labels_1S
        )
        assert nll.item() == pytest.approx(output.loss.item() * target_1T.shape[1], rel=1e-5)


@each_model
@torch.no_grad()
def test_padding_on_the_right_does_not_change_a_row(make_model: Any) -> None:
    model = context_model(make_model())
    nll_B, _ = model(BATCH)
    alone_B = torch.cat([model(row(FEATURES, TARGETS, index))[0] for index in range(BATCH.size)])
    torch.testing.assert_close(nll_B, alone_B, rtol=1e-5, atol=1e-5)
    assert nll_B.std() > 0.1


@torch.no_grad()
def test_the_likelihood_depends_on_the_image_and_on_its_adapters() -> None:
    model = context_model(tiny_llama())
    nll_B, _ = model(BATCH)
    other_B, _ = model(batch_of({"image": FEATURES.flip(0)}, TARGETS))
    assert ((nll_B - other_B)[[0, 2]].abs() > 1e-3).all()
    disturb([p for name, p in model.adapters.named_parameters() if ".deltas.group_image." in name], seed=9)
    assert ((nll_B - model(BATCH)[0]).abs() > 1e-3).all()


@torch.no_grad()
def greedy_by_recomputation(model: ContextModel, steps: int) -> Tensor:
    """Without a cache: the whole sequence again for every token."""
    prefix_BPD = model.embed(PROMPT)
    ids_BT = torch.zeros(PROMPT.size, 0, dtype=torch.long)
    for _ in range(steps):
        embeds_BSD = torch.cat([prefix_BPD, model.language_model.get_input_embeddings()(ids_BT)], dim=1)
        length = embeds_BSD.shape[1]
        model.router.set_layout([Segment(0, 1, "text"), Segment(1, 5, "image"), Segment(5, length, "text")])
        logits_BSV = model.language_model(inputs_embeds=embeds_BSD, use_cache=False).logits
        ids_BT = torch.cat([ids_BT, logits_BSV[:, -1:].argmax(dim=-1)], dim=1)
    return ids_BT


@each_model
@each_method
def test_generation_with_a_cache_equals_full_recomputation(make_model: Any, method: AdapterMethod) -> None:
    model = context_model(make_model(), method)
    expected_BT = greedy_by_recomputation(model, 12)
    assert expected_BT.unique(dim=0).shape[0] > 1  # rows differ, so their order matters
    never = next(token for token in range(64) if token not in expected_BT)
    assert torch.equal(model.generate(PROMPT, "text", 12, eos_id=never), expected_BT)


def test_after_eos_a_row_is_padded_with_eos() -> None:
    model = context_model(tiny_llama())
    free_BT = greedy_by_recomputation(model, 12)
    eos = next(token for token in free_BT[0].tolist() if not (free_BT == token).any(dim=1).all())
    found_BT = model.generate(PROMPT, "text", 12, eos_id=eos)
    for free_T, found_T in zip(free_BT.tolist(), found_BT.tolist(), strict=True):
        end = free_T.index(eos) if eos in free_T else len(free_T)
        assert found_T == free_T[:end] + [eos] * (len(found_T) - end)


@torch.no_grad()
def test_generation_leaves_no_state() -> None:
    model = context_model(tiny_llama())
    before_B, _ = model(BATCH)
    hooks = len(model.language_model._forward_pre_hooks)
    model.generate(PROMPT, "text", 5, EOS)
    assert len(model.language_model._forward_pre_hooks) == hooks
    assert torch.equal(model(BATCH)[0], before_B)


@torch.no_grad()
def test_projector_dropout_acts_before_the_projector_and_in_training_only() -> None:
    model = context_model(tiny_llama(), dropout=0.5)
    linear = model.projectors["image"].layers[1]  # type: ignore[union-attr, index]
    evaluated_BPD = model.embed(PROMPT)
    torch.testing.assert_close(evaluated_BPD[:, 1:], F.linear(FEATURES, linear.weight, linear.bias))
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.train()
    trained_BPD = model.embed(PROMPT)
    assert torch.equal(trained_BPD[:, 0], evaluated_BPD[:, 0])  # BOS is not a feature
    kept_MD = seen[0] != 0
    torch.testing.assert_close(seen[0][kept_MD], 2 * FEATURES.flatten(0, 1)[kept_MD])
    assert 0.3 < kept_MD.float().mean() < 0.7


def test_positions_are_those_that_the_language_model_read_without_padding() -> None:
    """BOS + 4 image tokens + the targets but the last of each row: 5 + 3, 5 + 1, 5 + 6."""
    assert BATCH.positions == 8 + 6 + 11


def test_features_of_several_contexts_are_in_order_and_have_their_own_adapters() -> None:
    grouping = {"image": "vision", "audio": "sound", "text": "language"}
    router, language_model = Router(grouping), tiny_llama()
    adapters = Adapters(language_model, dict.fromkeys(router.groups, METHODS["bitfit"]), router, seed=0)
    adapters.attach(language_model)
    model = model_of(language_model, {"image": 20, "audio": 6}, adapters, router)
    features = {"image": torch.ones(2, 4, 20), "audio": torch.ones(2, 3, 6)}
    batch = batch_of(features, torch.tensor([[5, EOS], [6, EOS]]), tuple(grouping))
    embeds_BTD = model.embed(batch)
    assert embeds_BTD.shape == (2, 1 + 4 + 3 + 2, 32)
    projected = [model.projectors[c](features[c].flatten(0, 1), ()).view(2, -1, 32) for c in ("image", "audio")]
    torch.testing.assert_close(embeds_BTD[:, 1:8], torch.cat(projected, dim=1))
    seen: list[Layout] = []
    language_model.model.register_forward_hook(lambda *_: seen.append(router.layout_of(9)))
    model(batch)
    spans = [tuple(span) for span in seen[0].spans or ()]
    assert spans == [(0, 1, "language"), (1, 5, "vision"), (5, 8, "sound"), (8, 9, "language")]


@each_method
@torch.no_grad()
def test_context_ids_give_the_same_result_as_segments(method: AdapterMethod) -> None:
    model = context_model(tiny_llama(), method)
    torch.testing.assert_close(model(ungroup(BATCH))[0], model(BATCH)[0], rtol=1e-5, atol=1e-5)


# ── Adapters on the bare language model


def gradients(model: Any, adapters: Adapters, x_BTD: Tensor) -> dict[str, Tensor]:
    adapters.zero_grad()
    model(inputs_embeds=x_BTD, use_cache=False).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in adapters.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_method
def test_activation_checkpointing_gives_the_same_gradients(method: AdapterMethod, use_reentrant: bool) -> None:
    model = tiny_llama().train()
    adapters = adapt(model, method)
    x_BTD = embeds().requires_grad_()  # as the projector's output does
    calls: list[None] = []
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(None))
    plain, plain_x_BTD = gradients(model, adapters, x_BTD), copy.deepcopy(x_BTD.grad)
    x_BTD.grad = None
    assert len(calls) == 1
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = gradients(model, adapters, x_BTD)
    assert len(calls) == 3, "nothing was recomputed"
    assert list(found) == list(plain) == [name for name, _ in adapters.named_parameters()]
    for name, grad in plain.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_BTD.grad, plain_x_BTD, rtol=1e-6, atol=1e-6)


@each_method
@each_model
def test_a_forward_pass_without_a_layout_or_with_that_of_another_batch_is_an_error(
    make_model: Any, method: AdapterMethod
) -> None:
    model = make_model()
    router = Router(resolve_grouping("specific", ("image", "text"))[0])
    Adapters(model, dict.fromkeys(router.groups, method), router, seed=0).attach(model)
    with pytest.raises(UserError, match="no layout was set"):
        model(inputs_embeds=embeds(), use_cache=False)
    router.set_layout([Segment(0, 10, "text")])
    with pytest.raises(RuntimeError, match="covers 10 positions but the batch has 11"):
        model(inputs_embeds=embeds(), use_cache=False)
