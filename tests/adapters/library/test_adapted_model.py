"""``harness.adapt`` and the model it returns: what goes in, what comes out, and how it is taken off again.

Shapes: B rows, T positions, D width, V vocabulary, N new tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartForCausalLM, BartForConditionalGeneration, DynamicCache

import harness
from adapters.methods.lora import LoRA, LoRAConfig
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, IMAGE, LORA, ROWS_BT, TEXT, adapted_model, logits, traces
from tests.support.adapters import adapt as attach_by_hand
from tests.support.adapters import disturb, embeds
from tests.support.models import each_model, tiny_llama, tiny_opt

# ── Forward


@each_model
def test_three_lines_are_what_routers_and_hooks_by_hand_compute(make_model: Any) -> None:
    by_hand, x_BTD = make_model(), embeds()
    attach_by_hand(by_hand, LoRA(LoRAConfig(rank=3, alpha=5.0)))
    with torch.no_grad():
        expected_BTV = by_hand(inputs_embeds=x_BTD, use_cache=False).logits

    model = make_model()
    adapted = harness.adapt(model, LORA, contexts=("image", "text"), grouping="specific")
    disturb(adapted.adapters.parameters())

    assert isinstance(adapted, harness.AdaptedModel)
    assert adapted.base_model is model
    assert torch.equal(logits(adapted, x_BTD, IDS_T), expected_BTV)
    assert torch.equal(logits(adapted, x_BTD, IDS_T.expand(3, -1)), expected_BTV)
    assert not torch.equal(logits(adapted, x_BTD, IDS_T.flip(0)), expected_BTV)


@each_model
def test_rows_with_layouts_of_their_own_are_what_each_is_alone(make_model: Any) -> None:
    adapted, x_BTD = adapted_model(make_model()), embeds()
    together_BTV = logits(adapted, x_BTD, ROWS_BT)
    alone_BTV = torch.cat([logits(adapted, x_BTD[row : row + 1], ROWS_BT[row]) for row in range(3)])
    torch.testing.assert_close(together_BTV, alone_BTV, rtol=1e-5, atol=1e-5)


def test_token_ids_labels_and_the_adapters_train_through_the_base() -> None:
    """The documented shape: BOS as text, projected image features, then text; the loss on the text after the image."""
    model = tiny_llama()
    embed = model.get_input_embeddings()
    projector = nn.Linear(20, 32)
    adapted = adapted_model(model)
    ids_BT = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(0))
    image_BND = projector(torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1)))
    x_BTD = torch.cat([embed(torch.ones(2, 1, dtype=torch.long)), image_BND, embed(ids_BT)], dim=1)
    labels_BT = torch.cat([torch.full((2, 5), -100), ids_BT], dim=1)
    context_ids = torch.tensor([TEXT] + [IMAGE] * 4 + [TEXT] * 5)
    out = adapted(
        inputs_embeds=x_BTD, attention_mask=torch.ones(2, 10).long(), labels=labels_BT, context_ids=context_ids
    )
    expected = F.cross_entropy(out.logits[:, 4:9].flatten(0, 1), ids_BT.flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert projector.weight.grad is not None
    assert projector.weight.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in adapted.adapters.parameters())
    assert all(p.grad is None for p in model.parameters())


@each_model
def test_padding_on_either_side_changes_no_real_token(make_model: Any) -> None:
    adapted, x_BTD = adapted_model(make_model()), embeds(2)
    lengths, ids_BT = (7, 11), torch.stack([IDS_T, IDS_T.flip(0)])
    alone = [logits(adapted, x_BTD[r : r + 1, :n], ids_BT[r, :n])[0] for r, n in enumerate(lengths)]
    for left in (False, True):
        padded_BTD, mask_BT, padded_ids_BT = (
            torch.zeros_like(x_BTD),
            torch.zeros(2, 11).long(),
            torch.zeros_like(ids_BT),
        )
        where = [slice(11 - n, 11) if left else slice(0, n) for n in lengths]
        for row, (part, n) in enumerate(zip(where, lengths, strict=True)):
            padded_BTD[row, part], mask_BT[row, part] = x_BTD[row, :n], 1
            padded_ids_BT[row, part] = ids_BT[row, :n]
        positions = {"position_ids": (mask_BT.cumsum(1) - 1).clamp(min=0)} if left else {}
        found_BTV = logits(adapted, padded_BTD, padded_ids_BT, attention_mask=mask_BT, **positions)
        for row, part in enumerate(where):
            torch.testing.assert_close(found_BTV[row, part], alone[row], rtol=1e-5, atol=1e-5)


@each_model
def test_a_cache_filled_in_pieces_equals_one_pass(make_model: Any) -> None:
    adapted, x_BTD = adapted_model(make_model()), embeds()
    expected_BTV = logits(adapted, x_BTD, ROWS_BT)
    cache, other, found = DynamicCache(), DynamicCache(), []
    seen_XK: list[Tensor] = []
    adapted.base_model.register_forward_hook(lambda *_: seen_XK.append(adapted.router.layout.context_ids_XK))
    for start, stop in ((0, 4), (4, 9), (9, 11)):
        found.append(logits(adapted, x_BTD[:, start:stop], ROWS_BT[:, start:stop], past_key_values=cache))
        # Another sequence in between is another cache's affair.
        logits(adapted, x_BTD[:1, start:stop], IDS_T[start:stop], past_key_values=other)
    torch.testing.assert_close(torch.cat(found, dim=1), expected_BTV, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen_XK[-1][0], IDS_T)
    cache.crop(-2)
    again_BTV = logits(adapted, x_BTD[:, 9:], ROWS_BT[:, 9:], past_key_values=cache)
    assert torch.equal(seen_XK[-1], ROWS_BT)
    torch.testing.assert_close(again_BTV, expected_BTV[:, 9:], rtol=1e-5, atol=1e-5)


def test_gradients_survive_the_bases_activation_checkpointing() -> None:
    def gradients(checkpointing: bool) -> list[Tensor | None]:
        model = tiny_llama()
        adapted = adapted_model(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted(inputs_embeds=embeds(), context_ids=ROWS_BT, use_cache=False).logits.square().sum().backward()
        return [p.grad for p in adapted.adapters.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


# ── Wrong input, one thing at a time


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"context_ids": None},
            r"context_ids: found none; allowed: int64 of shape \(11,\) or \(3, 11\) on cpu, values ",
        ),
        ({"context_ids": [0] * 11}, "context_ids: found list; allowed: int64"),
        ({"context_ids": IDS_T.int()}, r"context_ids: found dtype torch.int32; allowed: int64"),
        ({"context_ids": IDS_T.float()}, r"context_ids: found dtype torch.float32; allowed: int64"),
        ({"context_ids": IDS_T[:10]}, r"context_ids: found shape \(10,\); allowed: .*\(11,\) or \(3, 11\)"),
        ({"context_ids": ROWS_BT[:2]}, r"context_ids: found shape \(2, 11\); allowed: .*\(11,\) or \(3, 11\)"),
        ({"context_ids": ROWS_BT[..., None]}, r"context_ids: found shape \(3, 11, 1\)"),
        ({"context_ids": IDS_T.to("meta")}, "context_ids: found device meta; allowed: .* on cpu"),
        ({"context_ids": IDS_T + 1}, r"context_ids: found values from 1 to 2; .*values 0 \(image\), 1 \(text\)"),
        ({"context_ids": IDS_T - 1}, r"context_ids: found values from -1 to 0; .*values 0 \(image\), 1 \(text\)"),
        ({"inputs_embeds": None}, "either input_ids .* or inputs_embeds .*; found 0 of the two"),
        ({"input_ids": torch.ones(3, 11).long()}, "either input_ids .* or inputs_embeds .*; found 2 of the two"),
        ({"inputs_embeds": embeds()[0]}, r"inputs_embeds: found shape \(11, 32\); allowed: 3 dimensions"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, Any], message: str) -> None:
    adapted = adapted_model(tiny_llama())
    right = {"inputs_embeds": embeds(), "context_ids": IDS_T}
    adapted(**right)
    for call in (adapted, lambda **kwargs: adapted.generate(**kwargs, new_token_context="text")):
        with pytest.raises(UserError, match=message):
            call(**{**right, **inputs})


def test_a_cache_that_this_model_did_not_fill_is_named() -> None:
    adapted, x_BTD = adapted_model(tiny_llama()), embeds()
    foreign = tiny_llama()(inputs_embeds=x_BTD).past_key_values
    with pytest.raises(UserError, match="found 11 positions for 3 rows, 0 of them from this adapted model"):
        adapted(inputs_embeds=x_BTD, context_ids=IDS_T, past_key_values=foreign)
    own = adapted(inputs_embeds=x_BTD, context_ids=ROWS_BT).past_key_values
    with pytest.raises(UserError, match="found 11 positions for 2 rows, 11 of them from this adapted model"):
        adapted(inputs_embeds=x_BTD[:2], context_ids=IDS_T, past_key_values=own)
    with pytest.raises(UserError, match="past_key_values: found a filled cache"):
        adapted.generate(inputs_embeds=x_BTD, context_ids=IDS_T, new_token_context="text", past_key_values=own)


def test_generation_needs_the_new_tokens_context_and_padding_on_the_left() -> None:
    adapted = adapted_model(tiny_llama())
    inputs = {"inputs_embeds": embeds(2), "context_ids": IDS_T, "max_new_tokens": 2}
    with pytest.raises(UserError, match="new_token_context: found None; allowed: image, text"):
        adapted.generate(**inputs)
    with pytest.raises(UserError, match="new_token_context: found 'txt'; allowed: image, text; did you mean 'text'"):
        adapted.generate(**inputs, new_token_context="txt")
    mask_BT = torch.ones(2, 11).long()
    mask_BT[1, -2:] = 0
    with pytest.raises(UserError, match=r"rows \[1\] are padded on the right; allowed: padding on the left"):
        adapted.generate(**inputs, new_token_context="text", attention_mask=mask_BT)


# ── Generation


def greedily(adapted: Any, x_BTD: Tensor, ids_BT: Tensor, steps: int) -> Tensor:
    """Generate every token from a full forward pass over the tokens before it."""
    new: list[Tensor] = []
    for _ in range(steps):
        last_BV = logits(adapted, x_BTD, ids_BT, use_cache=False)[:, -1]
        last_BV[:, 63] = -torch.inf  # the end of sequence, which min_new_tokens forbids
        new.append(last_BV.argmax(dim=-1))
        x_BTD = torch.cat([x_BTD, adapted.base_model.get_input_embeddings()(new[-1])[:, None]], dim=1)
        ids_BT = F.pad(ids_BT, (0, 1), value=TEXT)
    return torch.stack(new, dim=1)


@each_model
def test_greedy_generation_equals_recomputing_everything(make_model: Any) -> None:
    adapted, x_BTD = adapted_model(make_model()), embeds()
    for ids in (IDS_T, ROWS_BT):
        expected_BN = greedily(adapted, x_BTD, ids.expand(3, -1), 7)
        for use_cache in (True, False):
            found_BN = adapted.generate(
                inputs_embeds=x_BTD, context_ids=ids, new_token_context="text", max_new_tokens=7, min_new_tokens=7,
                do_sample=False, use_cache=use_cache, eos_token_id=63, pad_token_id=0,
            )  # fmt: skip
            assert torch.equal(found_BN, expected_BN)
    as_image_BN = adapted.generate(
        inputs_embeds=x_BTD, context_ids=ROWS_BT, new_token_context="image", max_new_tokens=7, do_sample=False,
        min_new_tokens=7, eos_token_id=63, pad_token_id=0,
    )  # fmt: skip
    assert not torch.equal(as_image_BN, expected_BN)


@each_model
def test_beams_have_the_scores_that_recomputing_gives(make_model: Any) -> None:
    """Token ids as the prompt, which come back before the new tokens; rows with different layouts."""
    adapted = adapted_model(make_model())
    prompt_BT = torch.randint(1, 63, (3, 11), generator=torch.Generator().manual_seed(3))
    options = {"new_token_context": "text", "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 5}
    options |= {"min_new_tokens": 5, "length_penalty": 0.0, "pad_token_id": 0, "eos_token_id": 63, "do_sample": False}
    found = adapted.generate(
        prompt_BT, context_ids=ROWS_BT, return_dict_in_generate=True, output_scores=True, **options
    )
    assert torch.equal(found.sequences[:, :11], prompt_BT.repeat_interleave(2, 0))
    ids_BT = F.pad(ROWS_BT.repeat_interleave(2, 0), (0, 5), value=TEXT)
    with torch.no_grad():
        logits_BTV = adapted(found.sequences, context_ids=ids_BT).logits[:, 10:-1]
    picked_BN = logits_BTV.log_softmax(-1).gather(-1, found.sequences[:, 11:, None])[..., 0]
    torch.testing.assert_close(picked_BN.sum(dim=1), found.sequences_scores, rtol=1e-5, atol=1e-5)
    without_cache = adapted.generate(prompt_BT, context_ids=ROWS_BT, use_cache=False, **options)
    assert torch.equal(without_cache, found.sequences)


@each_model
def test_left_padded_prompts_generate_as_each_alone(make_model: Any) -> None:
    adapted, x_BTD = adapted_model(make_model()), embeds(2)
    options = {"new_token_context": "text", "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    alone_BN = torch.cat(
        [
            adapted.generate(inputs_embeds=x_BTD[:1, :7], context_ids=IDS_T[:7], **options),
            adapted.generate(inputs_embeds=x_BTD[1:], context_ids=IDS_T.flip(0), **options),
        ]
    )
    padded_BTD = torch.stack([F.pad(x_BTD[0, :7], (0, 0, 4, 0)), x_BTD[1]])
    ids_BT = torch.stack([F.pad(IDS_T[:7], (4, 0)), IDS_T.flip(0)])
    mask_BT = torch.stack([F.pad(torch.ones(7), (4, 0)), torch.ones(11)]).long()
    together_BN = adapted.generate(inputs_embeds=padded_BTD, context_ids=ids_BT, attention_mask=mask_BT, **options)
    assert torch.equal(together_BN, alone_BN)


def test_a_conversation_goes_on_from_the_cache_that_generation_left() -> None:
    adapted, x_BTD = adapted_model(tiny_llama()), embeds(1)
    found = adapted.generate(
        inputs_embeds=x_BTD, context_ids=IDS_T, new_token_context="text", max_new_tokens=3, min_new_tokens=3,
        do_sample=False, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    new_BND = adapted.base_model.get_input_embeddings()(found.sequences)
    whole_BTV = logits(adapted, torch.cat([x_BTD, new_BND], dim=1), F.pad(IDS_T, (0, 3), value=TEXT))
    last_BTV = logits(adapted, new_BND[:, 2:], torch.tensor([TEXT]), past_key_values=found.past_key_values)
    torch.testing.assert_close(last_BTV, whole_BTV[:, -1:], rtol=1e-5, atol=1e-5)


# ── Detaching


@pytest.mark.parametrize("failed", [False, True], ids=["after use", "after an exception in forward"])
@each_model
def test_detached_the_base_is_bit_for_bit_as_before(make_model: Any, failed: bool) -> None:
    model, x_BTD = make_model(), embeds()
    model.lm_head.weight.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        bare_BTV = model(inputs_embeds=x_BTD).logits
    before = traces(model)

    adapted = adapted_model(model, {"method": "lora+bitfit"})
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert not any(m.training for m in adapted.adapters.modules())
    assert not torch.equal(logits(adapted, x_BTD, IDS_T), bare_BTV)
    if failed:
        with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
            adapted(inputs_embeds=x_BTD, context_ids=IDS_T, labels=torch.zeros(3, 5).long())
    assert adapted.detach() is model

    assert traces(model) == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=x_BTD).logits, bare_BTV)
    for call in (lambda: adapted(inputs_embeds=x_BTD, context_ids=IDS_T), adapted.merge):
        with pytest.raises(UserError, match="this adapted model was detached"):
            call()


def test_a_model_is_adapted_once_at_a_time() -> None:
    model = tiny_llama()
    first = harness.adapt(model, LORA)
    for again in (model, first):
        with pytest.raises(UserError, match=r"already has adapters; remove them with harness\.detach\(model\)"):
            harness.adapt(again, LORA)
    first.detach()
    second = harness.adapt(model, LORA)
    assert first.detach() is model  # a second time, which is not the second adapter's affair
    assert logits(second, embeds(), IDS_T).shape == (3, 11, 64)


def test_an_adapter_that_cannot_be_attached_leaves_no_trace() -> None:
    model = tiny_opt().requires_grad_(True)
    before = traces(model)
    with pytest.raises(UserError, match=r"opt model has no layer with .*gate"):
        harness.adapt(model, {"method": "lora", "where": ["gate"]})
    assert traces(model) == before
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_no_kv_cache_is_refused() -> None:
    """The contexts of the tokens before are kept with the cache."""
    adapted = adapted_model(tiny_llama(), {"method": "moka", "rank": 2})
    with pytest.raises(UserError, match=r"past_key_values: found tuple, .*; allowed: a cache of transformers"):
        logits(adapted, embeds(), IDS_T, past_key_values=((torch.zeros(3, 2, 4, 8),) * 2,) * 2)
    for name in ("cache_params", "state"):
        with pytest.raises(UserError, match=f"{name}: a state of earlier tokens .* which moka needs; pass the whole"):
            logits(adapted, embeds(), IDS_T, **{name: object()})


def test_the_decoder_behind_an_encoder_is_refused() -> None:
    """Its tokens are not those of context_ids, also where there are as many."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    with pytest.raises(
        UserError, match=r"layer model\.decoder\.layers\.0\.\S+: the decoder of a BartForConditionalGen"
    ):
        harness.adapt(model, LORA, grouping="specific")
    roles = {"model.encoder.layers.*.self_attn.q_proj": "q"}
    adapted = harness.adapt(model, {"method": "lora", "where": ["q"]}, grouping="specific", roles=roles)
    ids_BT = torch.randint(3, 60, (2, 7))
    assert adapted(input_ids=ids_BT, decoder_input_ids=ids_BT[:, :4], context_ids=IDS_T[:7]).logits.shape[1] == 4
    harness.adapt(BartForCausalLM(config).eval(), LORA, grouping="specific")
