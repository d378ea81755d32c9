"""What ``harness.adapt`` accepts: methods, options, groupings; and the errors for everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import harness
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, adapted_model, logits
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_llama, tiny_opt

pytestmark = pytest.mark.quick

# Trainable parameters of one group on tiny_llama, both layers: (in + out) of q, k, v, o, gate, up, down.
SUMS = {"q": 64, "k": 48, "v": 48, "o": 64, "gate": 80, "up": 80, "down": 80}
LORA_1 = 2 * sum(SUMS.values())
BITFIT = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)


def counts(spec: Any, **options: Any) -> Any:
    return harness.adapt(tiny_llama(), spec, **options).num_trainable_parameters(by="group")


# ── Groupings


def test_one_method_for_all_groups() -> None:
    assert counts({"method": "lora", "rank": 3}) == {"all": 3 * LORA_1}
    assert counts({"method": "lora"}, grouping="specific") == {"image": 8 * LORA_1, "text": 8 * LORA_1}
    assert counts({"method": "lora+bitfit", "rank": 2}) == {"all": 2 * LORA_1 + BITFIT}


def test_a_method_for_each_group() -> None:
    spec = {"image": {"method": "lora", "rank": 5}, "text": {"method": "bitfit"}}
    assert counts(spec, grouping="specific") == {"image": 5 * LORA_1, "text": BITFIT}
    shared = {"image": "vision", "audio": "vision", "text": "language"}
    adapted = harness.adapt(
        tiny_llama(),
        {"vision": {"method": "lora", "rank": 5}, "language": {"method": "bitfit"}},
        contexts=("image", "audio", "text"),
        grouping=shared,
    )
    assert adapted.contexts == ("image", "audio", "text")
    assert adapted.num_trainable_parameters(by="group") == {"vision": 5 * LORA_1, "language": BITFIT}


def test_image_and_audio_of_one_group_are_adapted_alike() -> None:
    adapted = adapted_model(
        tiny_llama(), LORA, {"image": "v", "audio": "v", "text": "l"}, contexts=("image", "audio", "text")
    )
    ids_T = torch.tensor([2, 0, 1, 1, 0, 0, 2, 2, 2, 2, 2])
    as_image_T, as_text_T = (torch.where(ids_T == 1, other, ids_T) for other in (0, 2))
    found_BTV = logits(adapted, embeds(), ids_T)
    assert torch.equal(found_BTV, logits(adapted, embeds(), as_image_T))
    assert not torch.equal(found_BTV, logits(adapted, embeds(), as_text_T))


@pytest.mark.parametrize(
    ("spec", "grouping"),
    [({"image": LORA, "text": None}, "specific"), (LORA, {"image": "image", "text": None})],
    ids=["null in the spec", "null in the grouping"],
)
def test_a_context_with_null_has_no_adapter(spec: Any, grouping: Any) -> None:
    adapted = adapted_model(tiny_llama(), spec, grouping)
    assert adapted.num_trainable_parameters(by="group") == {"image": 3 * LORA_1}
    with torch.no_grad():
        bare_BTV = tiny_llama()(inputs_embeds=embeds()).logits
    assert torch.equal(logits(adapted, embeds(), torch.ones(11).long()), bare_BTV)
    assert not torch.equal(logits(adapted, embeds(), IDS_T), bare_BTV)


def test_roles_as_a_plain_list() -> None:
    adapted = harness.adapt(tiny_llama(), {"method": "lora", "rank": 1, "where": ["q", "v"]}, grouping="specific")
    assert adapted.num_trainable_parameters(by="role") == {"q": 2 * 2 * SUMS["q"], "v": 2 * 2 * SUMS["v"]}
    assert adapted.num_trainable_parameters() == 4 * (SUMS["q"] + SUMS["v"])


def test_a_method_without_groups() -> None:
    full = harness.adapt(tiny_opt(), {"method": "full", "embeddings": False})
    trained = sum(p.numel() for p in full.base_model.parameters() if p.requires_grad)
    ends = sum(p.numel() for p in full.base_model.get_input_embeddings().parameters())
    assert trained == sum(p.numel() for p in full.base_model.parameters()) - ends
    assert full.num_trainable_parameters() == trained
    assert full.num_trainable_parameters(by="group") == {"(shared)": trained}
    assert full.num_trainable_parameters(by="role") == {"model": trained}
    assert harness.adapt(tiny_opt(), {"method": "none"}).num_trainable_parameters() == 0
    full.detach()
    assert not any(p.requires_grad for p in full.base_model.parameters())


def test_the_seed_alone_decides_the_initialisation() -> None:
    weights = [harness.adapt(tiny_llama(), LORA, seed=seed).adapters.state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    assert not all(torch.equal(x, weights[2][name]) for name, x in weights[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_adapter_parameters_are_fp32_unless_the_base_is_float64(dtype: torch.dtype) -> None:
    adapted = harness.adapt(tiny_llama().to(dtype), {"method": "lora+bitfit"}, grouping="specific")
    assert {p.dtype for p in adapted.adapters.parameters()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    disturb(adapted.adapters.parameters())
    assert torch.get_default_dtype() == torch.float32
    assert logits(adapted, embeds().to(dtype), IDS_T).dtype == dtype


# ── Messages


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lora", "spec: found 'lora'; allowed: a mapping such as {'method': 'lora', 'rank': 8}"),
        ({"method": "lorra"}, "spec.method: unknown adapter 'lorra'; allowed: .*did you mean 'lora'"),
        ({"method": "lora+bitfat"}, "spec.method: unknown adapter 'bitfat'; allowed: .*did you mean 'bitfit'"),
        ({"method": 8}, "spec.method: found 8; allowed: "),
        ({"method": "lora", "rnk": 8}, "spec.rnk: unknown key 'rnk'; allowed: .*did you mean 'rank'"),
        ({"method": "lora", "rank": 0}, "spec.rank: input should be greater than 0; found 0"),
        ({"method": "lora", "rank": "8"}, "spec.rank: input should be a valid integer; found '8'"),
        ({"method": "lora", "rank": 999}, "999.*"),
        ({"method": "lora", "where": "FA"}, "spec.where: input should be 'A', 'F' or 'AF' or .*; found 'FA'"),
        ({"method": "lora", "where": ["q", "x"]}, r"spec.where: input should be .*; found \['q', 'x'\]"),
        ({"method": "lora", "rank": {1}}, "spec: options must be numbers, strings, lists and mappings; .*set"),
        ({"image": LORA}, "spec: group 'text' is missing; give it a method, or None for no adapter"),
        ({"image": LORA, "txt": LORA}, "spec: found 'txt', .*allowed: image, text; did you mean 'text'"),
        ({"image": LORA, "text": "bitfit"}, "spec.text: found 'bitfit'; allowed: a mapping with 'method', or None"),
        ({"image": LORA, "text": {"rank": 1}}, "spec.text: 'method' is required; allowed: "),
        ({"image": LORA, "text": {"method": "lora", "rank": -1}}, "spec.text.rank: .*greater than 0; found -1"),
        ({"image": LORA, "text": {"method": "full"}}, "spec.text.method: full has no adapter groups"),
        ({"image": None, "text": None}, "spec: no group has a method; for no adapter at all use {'method': 'none'}"),
        ({"method": "full"}, "grouping: full has no adapter groups; leave 'grouping' out"),
    ],
    ids=str,
)
def test_a_wrong_spec(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        harness.adapt(tiny_llama(), spec, grouping="specific")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": "image"}, "contexts: found 'image'; allowed: names"),
        ({"contexts": ()}, r"contexts: found \(\); allowed: names"),
        ({"contexts": ("a.b", "text")}, r"contexts: found \('a.b', 'text'\); allowed: names"),
        ({"contexts": ("text", "text")}, r"contexts: found \('text', 'text'\); each is named once"),
        ({"grouping": "specfic"}, "grouping: found 'specfic'; .*did you mean 'specific'"),
        ({"grouping": {"image": "v"}}, "grouping: context 'text' is missing"),
        ({"grouping": {"image": "v", "txt": "l"}}, "grouping: unknown context 'txt'; .*did you mean 'text'"),
        ({"seed": "0"}, "seed: found '0'; allowed: an integer"),
        ({"roles": ["q"]}, r"roles: found \['q'\]; allowed: path pattern → role"),
        ({"roles": {"lm_head": "head"}}, "unknown role 'head'"),
    ],
    ids=str,
)
def test_wrong_contexts_groupings_seeds_and_roles(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        harness.adapt(tiny_llama(), LORA, **options)


def test_what_is_no_language_model_and_what_is_counted() -> None:
    with pytest.raises(UserError, match="model: found Linear; allowed: a Hugging Face causal language model"):
        harness.adapt(torch.nn.Linear(2, 2), LORA)
    with pytest.raises(UserError, match=r"by: found 'rôle'; allowed: group, role; did you mean 'role'.*, or None"):
        harness.adapt(tiny_llama(), LORA).num_trainable_parameters(by="rôle")
