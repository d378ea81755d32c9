"""Methods that join tokens or positions, on a small model of every vision- and audio-language class.

mmca and moka are compared with dense forms by hand in float64; soft prompts with the inner language model alone, as a
causal LM that gets the vectors that the class makes of a picture. Shapes: B rows, T positions, H heads, E features of a
head, R rank, I and O input and output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

import harness
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.vlm_adapters import GREEDY, ROWS, adapted, every_class, language_model_of, logits, real
from tests.support.vlms import MEDIA, VLMS, inputs, small

MOKA = {"method": "moka", "rank": 2}
PROMPT = {"method": "soft_prompt", "num_virtual_tokens": 3}
THREE_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OWN_MASK = ("paligemma", "gemma3")


class Dense:
    """Multi-modal causal attention of one batch without a cache, from the class's own mask."""

    medium_BT: Tensor


def dense(
    _module: Any, q_BHTE: Tensor, k: Tensor, v: Tensor, mask_B1TT: Tensor, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    medium_BT = Dense.medium_BT
    k, v = (of.repeat_interleave(q_BHTE.shape[1] // k.shape[1], dim=1) for of in (k, v))
    scores_BHTT = q_BHTE @ k.mT * (scaling or q_BHTE.shape[-1] ** -0.5)
    out_BHTE = torch.zeros_like(q_BHTE)
    itself_TT = torch.eye(medium_BT.shape[1], dtype=torch.bool)
    for query_is_medium, key_is_medium in ((False, False), (False, True), (True, True)):
        seen_BTT = (medium_BT[:, :, None] == query_is_medium) & (medium_BT[:, None] == key_is_medium)
        seen_BTT = seen_BTT & itself_TT if query_is_medium else seen_BTT
        seen_B1TT = seen_BTT[:, None] & (mask_B1TT == 0)
        weights_BHTT = scores_BHTT.masked_fill(~seen_B1TT, -torch.inf).softmax(-1).nan_to_num(0.0)
        out_BHTE = out_BHTE + weights_BHTT @ v
    return out_BHTE.transpose(1, 2).contiguous(), None


AttentionInterface.register("tests_dense_mmca", dense)
AttentionMaskInterface.register("tests_dense_mmca", eager_mask)


@every_class
def test_mmca_attends_to_each_source_by_itself(name: str) -> None:
    base, medium = small(name, torch.float64), VLMS[name].context
    contexts_from = {MEDIA: medium}
    if name == "paligemma":
        with pytest.raises(UserError, match="mmca cannot replace the attention of a paligemma model, which caps its"):
            harness.adapt(base, {"method": "mmca"}, (medium, "text"), contexts_from=contexts_from)
        return
    given = inputs(name, ROWS, dtype=torch.float64)
    plain_BTV = logits(base, given, use_cache=False)
    model = harness.adapt(base, {"method": "mmca"}, (medium, "text"), contexts_from=contexts_from)
    found_BTV, texts = logits(model, given, use_cache=False), model.generate(**given, **GREEDY)
    assert texts.tolist() == model.generate(**given, **GREEDY, use_cache=False).tolist()
    assert torch.equal(logits(model.detach(), given, use_cache=False), plain_BTV)
    reference = small(name, torch.float64)
    reference.get_decoder().set_attn_implementation("tests_dense_mmca")
    Dense.medium_BT = given["input_ids"] == MEDIA
    expected_BTV = logits(reference, given, use_cache=False)
    torch.testing.assert_close(found_BTV[real(given)], expected_BTV[real(given)], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found_BTV[real(given)], plain_BTV[real(given)])


@contextmanager
def dense_moka(base: Any, model: harness.AdaptedModel, given: dict[str, Any]) -> Iterator[None]:
    medium_BT = given["input_ids"] == MEDIA
    earlier_TT = torch.ones(medium_BT.shape[1], medium_BT.shape[1], dtype=torch.bool).tril(-1)
    seen_BTT = medium_BT[:, :, None] & (~medium_BT & real(given))[:, None] & earlier_TT
    parameters, handles = dict(model.adapters.named_parameters()), []
    for key in model.adapters.layers:
        own = f"layers.{key}.changes.moka."

        def add(_module: Any, args: tuple[Tensor, ...], y_BTO: Tensor, own: str = own) -> Tensor:
            groups = (model.contexts[0], "text")
            A_medium, A_text = (parameters[f"{own}deltas.group_{group}.lora_A"] for group in groups)
            whole = args[0].shape[1] > 1  # else a generated token, which is text
            of_medium = medium_BT[..., None] if whole else torch.zeros(1, 1, 1, dtype=torch.bool)
            z_BTR = torch.where(of_medium, F.linear(args[0], A_medium), F.linear(args[0], A_text))
            if whole:
                scores_BTT = (z_BTR @ z_BTR.mT / z_BTR.shape[-1] ** 0.5).masked_fill(~seen_BTT, -torch.inf)
                z_BTR = z_BTR + scores_BTT.softmax(-1).nan_to_num(0.0) @ z_BTR
            return y_BTO + F.linear(z_BTR, parameters[f"{own}lora_B"])

        handles.append(base.get_submodule(key.replace("/", ".")).register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


@every_class
def test_moka_attends_to_earlier_text_in_low_rank(name: str) -> None:
    given = inputs(name, ROWS, dtype=torch.float64)
    model, base = adapted(name, MOKA, small(name, torch.float64)), small(name, torch.float64)
    found_BTV, texts = logits(model, given, use_cache=False), model.generate(**given, **GREEDY)
    with dense_moka(base, model, given):
        expected_BTV = logits(base, given, use_cache=False)
        assert texts.tolist() == base.generate(**given, **GREEDY).tolist()
    torch.testing.assert_close(found_BTV[real(given)], expected_BTV[real(given)], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found_BTV[real(given)], logits(base, given, use_cache=False)[real(given)])


def inner_causal_lm(base: Any) -> Any:
    """The inner language model and the output layer as a causal LM."""
    model = AutoModelForCausalLM.from_config(base.config.get_text_config()).to(torch.float64).eval()
    model.get_decoder().load_state_dict(base.get_decoder().state_dict())
    model.set_output_embeddings(base.get_output_embeddings())
    return model


def vectors(base: Any, given: dict[str, Any]) -> Tensor:
    """What the inner language model reads (B, T, D)."""
    found: list[Tensor] = []
    handle = base.get_submodule(language_model_of(base)).register_forward_pre_hook(
        lambda _module, _args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(base, given)
    handle.remove()
    return found[0]


@every_class
def test_soft_prompts_come_before_the_sequence_of_pictures_and_text(name: str) -> None:
    base, medium = small(name, torch.float64), VLMS[name].context
    if name in (*THREE_AXES, *OWN_MASK):
        why = "its positions have three axes" if name in THREE_AXES else "it makes a mask of its own"
        with pytest.raises(UserError, match=f"soft_prompt cannot be used with a {name} model: {why}"):
            adapted(name, PROMPT, base)
        assert not hasattr(base, "_context_peft_adapted")
        return
    given = inputs(name, ROWS, dtype=torch.float64)
    x_BTD, lm, ids_BT = vectors(base, given), inner_causal_lm(base), (given["input_ids"] != MEDIA).long()
    model = adapted(name, PROMPT, base)
    alone = harness.adapt(lm, PROMPT, (medium, "text"), "specific")
    alone.load_state_dict(model.state_dict())
    found_BTV, texts_BT = logits(model, given, use_cache=False), model.generate(**given, **GREEDY)[:, -5:]
    rest = {"context_ids": ids_BT, "attention_mask": given["attention_mask"]}
    expected_BTV = logits(alone, {"inputs_embeds": x_BTD, **rest}, use_cache=False)
    torch.testing.assert_close(found_BTV[real(given)], expected_BTV[real(given)], rtol=1e-9, atol=1e-9)
    expected_BT = alone.generate(inputs_embeds=x_BTD, **rest, new_token_context="text", **GREEDY)
    assert texts_BT.tolist() == expected_BT[:, -5:].tolist()
    disturb(model.adapters.parameters(), seed=5)
    assert not torch.allclose(logits(model, given, use_cache=False)[real(given)], found_BTV[real(given)])
