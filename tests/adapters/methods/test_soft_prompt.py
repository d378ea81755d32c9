"""Soft prompts: against the plain model with the prompt in its input, against peft, and the mask against loops.

Shapes: B rows, T positions, P positions of one prompt, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import harness
from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.combination import combine
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.methods.mmca import MMCA
from adapters.methods.moka import MokA
from adapters.methods.soft_prompt import SoftPrompt, SoftPromptConfig, SoftPrompts
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.contexts import Segment, resolve_grouping
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.models import tiny_gpt2, tiny_llama, tiny_neox, tiny_opt
from tests.support.zoo import small

pytestmark = pytest.mark.quick

CONTEXTS = ("image", "text")
P = 3
IDS = torch.tensor([[1, 0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 0, 1]])  # rows with different layouts
FAMILIES = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2, "gpt_neox": tiny_neox}
METHOD = SoftPrompt(SoftPromptConfig(num_virtual_tokens=P))


def adapt(model: Any, grouping: Any = "specific", method: AdapterMethod = METHOD) -> Adapters:
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    adapters = Adapters(model, dict.fromkeys(router.groups, method), router, seed=0)
    disturb(adapters.parameters())
    adapters.attach(model)
    return adapters


def prompt_of(adapters: Adapters, group: str) -> Tensor:
    return adapters.get_parameter(f"model_changes.soft_prompt.prompts.group_{group}.embedding")


def embeds(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1))


def output(model: Any, adapters: Adapters, x_BTD: Tensor, ids_XT: Tensor, **options: Any) -> Any:
    adapters.router.set_context_ids(ids_XT)
    return model(inputs_embeds=x_BTD, **{"use_cache": False, **options})


def with_prompt(prompt_PD: Tensor, x_BTD: Tensor) -> Tensor:
    return torch.cat([prompt_PD.expand(len(x_BTD), -1, -1), x_BTD], dim=1)


@pytest.mark.parametrize(
    ("make_model", "implementation"), [*((make, "sdpa") for make in FAMILIES.values()), (tiny_llama, "eager")]
)
def test_for_tokens_of_one_group_it_is_as_if_only_its_prompt_were_there(make_model: Any, implementation: str) -> None:
    """Right-padded rows; logits, a loss of labels, the last logits alone, hidden states, and gradients."""
    model, x_BTD = make_model(), embeds()
    model.set_attn_implementation(implementation)
    adapters = adapt(model)
    prompt_PD = prompt_of(adapters, "text")
    mask_BT = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    labels_BT = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(3)).masked_fill(mask_BT == 0, -100)
    found = output(
        model, adapters, x_BTD, IDS[:1] * 0 + 1, attention_mask=mask_BT, labels=labels_BT, output_hidden_states=True
    )
    (grad_PD,) = torch.autograd.grad(found.loss, prompt_PD)
    last_B1V = output(model, adapters, x_BTD, IDS[:1] * 0 + 1, attention_mask=mask_BT, logits_to_keep=1).logits
    adapters.detach()
    labels = F.pad(labels_BT, (P, 0), value=-100)
    expected = model(
        inputs_embeds=with_prompt(prompt_PD, x_BTD), attention_mask=F.pad(mask_BT, (P, 0), value=1), labels=labels,
        use_cache=False,
    )  # fmt: skip
    real_BT = mask_BT.bool()
    torch.testing.assert_close(found.logits[real_BT], expected.logits[:, P:][real_BT], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_B1V, found.logits[:, -1:], rtol=1e-4, atol=1e-5)
    assert {hidden_BTD.shape for hidden_BTD in found.hidden_states} == {x_BTD.shape}
    # The first label is not predicted by any position, as without prompts.
    shifted = F.cross_entropy(expected.logits[:, P:-1].transpose(1, 2), labels_BT[:, 1:], ignore_index=-100)
    torch.testing.assert_close(found.loss, shifted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_PD, torch.autograd.grad(shifted, prompt_PD)[0], rtol=1e-3, atol=1e-5)


def test_agnostic_it_is_pefts_prompt_tuning() -> None:
    peft = pytest.importorskip("peft")
    model, x_BTD = tiny_llama(), embeds()
    adapters = adapt(model, "agnostic")
    prompt_PD = prompt_of(adapters, "all")
    found_BTV = output(model, adapters, x_BTD, IDS).logits
    (found_PD,) = torch.autograd.grad(found_BTV.square().sum(), prompt_PD)
    adapters.detach()
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    weight_PD = theirs.prompt_encoder["default"].embedding.weight
    weight_PD.data.copy_(prompt_PD.data)
    expected_BTV = theirs(inputs_embeds=x_BTD, use_cache=False).logits[:, P:]
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-5, atol=1e-5)
    expected_PD = torch.autograd.grad(expected_BTV.square().sum(), weight_PD)[0]
    torch.testing.assert_close(found_PD, expected_PD, rtol=1e-4, atol=1e-4 * expected_PD.abs().max().item())


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("grouping", ["specific", "agnostic", {"image": None, "text": "language"}], ids=str)
def test_the_mask_and_the_positions_follow_their_definition(grouping: Any, past: int) -> None:
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    prompts = SoftPrompts({group: torch.zeros(P, 4) for group in router.groups}, router)
    attended_BS = torch.ones(2, past + 7).long()
    attended_BS[1, :2] = 0
    router.set_context_ids(IDS)
    mask = prompts._mask(router.layout, past, attended_BS, torch.device("cpu"))
    owners = [group for group in router.groups for _ in range(P)]
    expected = torch.zeros(2, (0 if past else len(owners)) + 7, len(owners) + past + 7).bool()
    for b in range(2):
        for i, own in enumerate([] if past else owners):
            expected[b, i, : len(owners)] = torch.tensor([o == own and j <= i for j, o in enumerate(owners)])
        for t in range(7):
            group = router.grouping[CONTEXTS[int(IDS[b, t])]]
            seen = [(s <= past + t and bool(attended_BS[b, s])) or s == past + t for s in range(past + 7)]
            expected[b, t - 7] = torch.tensor([owner == group for owner in owners] + seen)
    assert torch.equal(mask, expected)
    added = 0 if past else len(owners)
    positions = prompts._positions(past, 7, attended_BS, None, added, torch.device("cpu"))
    own = [] if past else list(range(P)) * len(router.groups)
    assert positions[0].tolist() == own + [P + past + t for t in range(7)]
    assert positions[1].tolist() == own + [P + max(past + t - 2, 0) for t in range(7)]


@torch.no_grad()
def test_tokens_without_group_see_no_prompt() -> None:
    model, x_BTD = tiny_llama(), embeds()
    base_BTV = model(inputs_embeds=x_BTD, use_cache=False).logits
    adapters = adapt(model, {"image": None, "text": "language"})
    found_BTV = output(model, adapters, x_BTD, torch.tensor([[0, 0, 0, 1, 1, 1, 1]])).logits
    # Three places further on, which Llama's relative positions do not show.
    torch.testing.assert_close(found_BTV[:, :3], base_BTV[:, :3], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(found_BTV[:, 3:], base_BTV[:, 3:], atol=1e-3).all(dim=-1).any()


@pytest.mark.parametrize(("make_model", "num_beams"), [(tiny_llama, 1), (tiny_opt, 1), (tiny_llama, 3)])
@torch.no_grad()
def test_generation_from_left_padded_rows_equals_one_row_at_a_time(make_model: Any, num_beams: int) -> None:
    """With the KV cache, against each row alone without it."""
    model, x_BTD = make_model(), embeds()
    adapters = adapt(model)
    mask_BT = torch.tensor([[1] * 7, [0, 0] + [1] * 5])

    def generate(x: Tensor, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        adapters.router.set_context_ids(ids)
        with layouts_while_generating(model, adapters.router, "text"):
            tokens: Tensor = model.generate(
                inputs_embeds=x, attention_mask=mask, max_new_tokens=3, do_sample=False, num_beams=num_beams,
                eos_token_id=None, pad_token_id=0, **options,
            )  # fmt: skip
        return tokens

    together = generate(x_BTD, IDS, mask_BT)
    for index, start in enumerate((0, 2)):
        row = slice(index, index + 1)
        alone = generate(x_BTD[row, start:], IDS[row, start:], torch.ones(1, 7 - start).long(), use_cache=False)
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("method", ["soft_prompt", "soft_prompt+mmca", "soft_prompt+lora"])
@torch.no_grad()
def test_a_prompt_that_is_read_in_chunks(method: str) -> None:
    """The logits of every step are those of a pass over the whole sequence: the cache has the prompts' places too."""
    adapted = harness.adapt(tiny_llama(), {"method": method, "num_virtual_tokens": P}, grouping="specific")
    disturb(adapted.adapters.parameters())
    prompt_BT = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(3))
    options = {
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(prompt_BT),
    }
    found = adapted.generate(
        input_ids=prompt_BT, context_ids=IDS, new_token_context="text", max_new_tokens=4, prefill_chunk_size=3,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    ids_BT = torch.cat([IDS, torch.ones(2, 4).long()], dim=1)
    whole_BTV = adapted(input_ids=found.sequences, context_ids=ids_BT, use_cache=False).logits
    for step, logits_BV in enumerate(found.logits):
        torch.testing.assert_close(logits_BV, whole_BTV[:, 6 + step], rtol=1e-4, atol=1e-4)


def test_a_cache_of_a_fixed_size_is_refused() -> None:
    adapted = harness.adapt(tiny_llama(), {"method": "soft_prompt"}, grouping="specific")
    with pytest.raises(
        UserError, match="past_key_values: found a StaticCache, of a fixed size without room for prompts"
    ):
        adapted.generate(
            input_ids=torch.ones(1, 7).long(), context_ids=IDS[0], new_token_context="text", max_new_tokens=20,
            cache_implementation="static", do_sample=False,
        )  # fmt: skip


@torch.no_grad()
def test_token_ids_and_a_cache_filled_by_hand() -> None:
    model = tiny_llama()
    adapters = adapt(model)
    ids_BT = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(3))
    expected_BTV = output(model, adapters, model.get_input_embeddings()(ids_BT), IDS).logits
    cache = DynamicCache(config=model.config)
    adapters.router.set_context_ids(IDS[:, :4])
    first_BTV = model(ids_BT[:, :4], past_key_values=cache, use_cache=True).logits
    adapters.router.set_context_ids(IDS[:, 4:], adapters.router.layout.context_ids_XK)
    rest_BTV = model(ids_BT[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first_BTV, rest_BTV], dim=1), expected_BTV, rtol=1e-4, atol=1e-5)


def test_with_lora_a_groups_prompt_is_tokens_of_the_group() -> None:
    method_class = combine((SoftPrompt, LoRA))
    method = method_class(method_class.Config(num_virtual_tokens=P, rank=2))
    model, x_BTD = tiny_llama(), embeds()
    both = adapt(model, "specific", method)
    found_BTV = output(model, both, x_BTD, IDS[:1] * 0 + 1).logits
    prompt_PD = prompt_of(both, "text")
    both.detach()
    lora = adapt(model, "specific", LoRA(LoRAConfig(rank=2)))
    lora.load_state_dict({n: p for n, p in both.state_dict().items() if n in lora.state_dict()}, strict=True)
    lora.router.set_layout([Segment(0, P + 7, "text")])
    expected_BTV = model(inputs_embeds=with_prompt(prompt_PD, x_BTD), use_cache=False).logits[:, P:]
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [LoRA, MMCA, MokA])
@torch.no_grad()
def test_combined_it_generates_with_a_cache_what_it_does_without(other: Any) -> None:
    method_class = combine((SoftPrompt, other))
    model = tiny_llama()
    adapters = adapt(model, "specific", method_class(method_class.Config(num_virtual_tokens=P)))
    tokens = []
    for use_cache in (True, False):
        adapters.router.set_context_ids(IDS)
        with layouts_while_generating(model, adapters.router, "text"):
            tokens.append(
                model.generate(
                    inputs_embeds=embeds(), attention_mask=torch.tensor([[1] * 7, [0, 0] + [1] * 5]), max_new_tokens=3,
                    do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=use_cache,
                )
            )  # fmt: skip
    assert torch.equal(tokens[0], tokens[1])


@torch.no_grad()
def test_a_layout_set_once_serves_several_passes_of_its_length_only() -> None:
    model, x_BTD = tiny_llama(), embeds()
    adapters = adapt(model)
    first_BTV = output(model, adapters, x_BTD, IDS).logits
    assert torch.equal(model(inputs_embeds=x_BTD, use_cache=False).logits, first_BTV)
    for length in (6, 7 + 2 * P):
        with pytest.raises(RuntimeError, match=f"the layout covers 7 positions but the batch has {length}"):
            model(inputs_embeds=embeds(2, length), use_cache=False)


def test_where_prompts_start() -> None:
    model = tiny_llama()
    weight_VD = model.get_input_embeddings().weight
    router = Router(resolve_grouping("specific", CONTEXTS)[0])
    started = Adapters(model, dict.fromkeys(router.groups, METHOD), router, seed=0)
    for group in CONTEXTS:
        assert (prompt_of(started, group)[:, None] == weight_VD).all(dim=-1).any(dim=-1).all()
    assert not torch.equal(prompt_of(started, "image"), prompt_of(started, "text"))
    assert started.parameters_by_group() == dict.fromkeys(CONTEXTS, P * 32)
    normal = SoftPrompt(SoftPromptConfig(num_virtual_tokens=500, init="normal"))
    drawn_PD = prompt_of(Adapters(model, dict.fromkeys(router.groups, normal), router, seed=0), "text")
    assert drawn_PD.std().item() == pytest.approx(weight_VD.std().item(), rel=0.05)


def test_wrong_input() -> None:
    model = tiny_llama()
    router = Router(resolve_grouping("specific", CONTEXTS)[0])
    methods = {"image": METHOD, "text": SoftPrompt(SoftPromptConfig(num_virtual_tokens=4))}
    with pytest.raises(UserError, match="soft_prompt: all groups of a model must have the same options"):
        Adapters(model, methods, router, seed=0).attach(model)
    model = tiny_llama()
    adapters = adapt(model)
    with pytest.raises(UserError, match=r"soft_prompt: attention_mask: found 4 dimensions"):
        output(model, adapters, embeds(), IDS, attention_mask=torch.ones(2, 1, 7, 7).bool())
    model.config.sliding_window = 12
    with pytest.raises(UserError, match="soft_prompt: 13 positions, prompts included, exceed sliding_window=12"):
        output(model, adapters, embeds(), IDS)
    for off in (0, None):
        model.config.sliding_window = off
        output(model, adapters, embeds(), IDS)
    model.config.sliding_window, model.config.layer_types = 12, ["full_attention"] * 2  # no layer uses it
    output(model, adapters, embeds(), IDS)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attention 'flash_attention_2' does not accept a mask; allowed: sdpa, eager"):
        output(model, adapters, embeds(), IDS)
    with pytest.raises(ValidationError, match=r"init\n.*'vocab' or 'normal'"):
        SoftPromptConfig(init="zero")  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_a_decoder_without_position_ids_is_refused(model_type: str) -> None:
    with pytest.raises(UserError, match=rf"soft_prompt cannot be used with a {model_type} model: .*no .*position_ids"):
        adapt(small(model_type))


def test_a_decoder_whose_positions_are_biases_is_refused() -> None:
    with pytest.raises(UserError, match=r"soft_prompt cannot be used with a falcon model: positions are biases"):
        adapt(small("falcon", alibi=True))


def test_masks_of_a_model_around_the_decoder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("gemma3")
    with pytest.raises(UserError, match="soft_prompt cannot be used with a gemma3 model: it makes a mask of its own"):
        harness.adapt(model, {"method": "soft_prompt"}, grouping="specific")
    monkeypatch.setattr("adapters.methods.soft_prompt._OWN_MASK", ())  # as of a model that is not known to
    adapted = harness.adapt(model, {"method": "soft_prompt"}, grouping="specific")
    with pytest.raises(UserError, match="soft_prompt: this model makes a mask for each kind of layer"):
        adapted(input_ids=torch.randint(3, 60, (2, 7)), context_ids=torch.tensor([0] * 3 + [1] * 4), use_cache=False)
