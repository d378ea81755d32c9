"""``where`` by part: adapters in the tower and the connector of a small vision- or audio-language model of every class.

The reference is again the product by hand in float64 (``by_one_hot``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from adapters.placement.parts import MEDIA as KNOWN
from harness.core.errors import UserError
from tests.support.models import tiny_llama
from tests.support.vlm_adapters import (
    GREEDY,
    ROWS,
    adapted,
    adapted_layers,
    by_one_hot,
    each_class,
    every_class,
    language_model_of,
    linear_layers,
    logits,
    real,
    refused,
)
from tests.support.vlms import MEDIA, VLMS, inputs, small

# What is no layer of a tower's blocks: the connector, and what encodes positions or letters
_BESIDE = {"model.encoder.input_linear", "model.encoder.out", "model.encoder.out_mid"}


def where(name: str, **places: Any) -> dict[str, Any]:
    """Part → place, where ``tower`` is the one that the class has; Gemma 3 has no layer in its connector."""
    found = {KNOWN[name].part if part == "tower" else part: place for part, place in places.items()}
    if name == "gemma3":
        found.pop("connector", None)
    return found


def lora(name: str, **places: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": 2, "where": where(name, **places)}


@every_class
def test_all_parts_get_the_updates_of_their_tokens(name: str) -> None:
    given = inputs(name, ROWS, dtype=torch.float64)
    spec = lora(name, language="AF", tower="all", connector="all")
    model = adapted(name, spec, small(name, torch.float64))
    found_BTV = logits(model, given, use_cache=False)
    base = small(name, torch.float64)
    with by_one_hot(base, model, given):
        expected_BTV = logits(base, given, use_cache=False)
    torch.testing.assert_close(found_BTV[real(given)], expected_BTV[real(given)], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found_BTV, logits(base, given, use_cache=False))
    medium = KNOWN[name]
    layers = linear_layers(base, language_model_of(base), medium.tower, *medium.connector) - _BESIDE
    unread = {path for path in layers if name in ("llava", "llava_next") and "vision_tower.encoder.layers.1" in path}
    assert adapted_layers(model) == layers - unread


@every_class
def test_some_roles_of_a_tower_alone(name: str) -> None:
    given = inputs(name, ROWS, dtype=torch.float64)
    model = adapted(name, lora(name, tower=["q", "v"]), small(name, torch.float64))
    base = small(name, torch.float64)
    with by_one_hot(base, model, given):
        expected_BTV = logits(base, given, use_cache=False)
    found_BTV = logits(model, given, use_cache=False)
    torch.testing.assert_close(found_BTV[real(given)], expected_BTV[real(given)], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found_BTV, logits(base, given, use_cache=False))
    assert model.num_trainable_parameters("role").keys() == {f"{KNOWN[name].part} {role}" for role in "qv"}
    assert model.num_trainable_parameters("group")["text"] == 0


@each_class
def test_every_parameter_has_a_gradient_with_checkpointing_too(name: str) -> None:
    given = inputs(name, ROWS, dtype=torch.float64)
    spec = lora(name, language="AF", tower="all", connector="all")

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapted(name, spec, small(name, torch.float64)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**given, use_cache=False).logits.square().mean().backward()
        return {key: p.grad for key, p in model.adapters.named_parameters() if p.grad is not None}

    plain = gradients(False)
    again = gradients(True) if small(name).supports_gradient_checkpointing else plain  # Granite Speech has none
    assert plain.keys() == {key for key, _ in adapted(name, spec).adapters.named_parameters()}
    assert [key for key, g in plain.items() if not g.any()] == []
    for key, g in plain.items():
        torch.testing.assert_close(again[key], g, rtol=1e-9, atol=1e-12)


@each_class
def test_it_is_saved_and_loaded_and_merged(name: str, tmp_path: Path) -> None:
    given = inputs(name, ROWS, dtype=torch.float64)
    spec = lora(name, language=["q"], tower="A", connector="all")
    model = adapted(name, spec, small(name, torch.float64), grouping="agnostic")
    expected_BTV, texts = logits(model, given), model.generate(**given, **GREEDY).tolist()
    model.save(tmp_path)
    loaded = harness.load_adapter(small(name, torch.float64), tmp_path)
    assert torch.equal(logits(loaded, given), expected_BTV)
    merged = model.merge()
    torch.testing.assert_close(logits(merged, given), expected_BTV, rtol=1e-9, atol=1e-9)
    assert merged.generate(**given, **GREEDY).tolist() == texts


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "granite_speech"])
@pytest.mark.parametrize(
    "spec",
    [
        {"method": "ia3"},
        {"method": "bitfit"},
        {"method": "dora", "rank": 2},
        {"method": "vera", "rank": 4},
        {"method": "bottleneck", "bottleneck_size": 4},
        {"method": "lora+bitfit", "rank": 2},
    ],
    ids=lambda spec: str(spec["method"]),
)
def test_other_methods_begin_as_the_class_itself_and_train_in_its_tower(name: str, spec: dict[str, Any]) -> None:
    given, base, medium = inputs(name, ROWS), small(name), VLMS[name].context
    expected_BTV = logits(base, given)
    spec = {**spec, "where": where(name, tower="AF")}
    model = harness.adapt(base, spec, (medium, "text"), "specific", contexts_from={MEDIA: medium})
    torch.testing.assert_close(logits(model, given), expected_BTV, rtol=1e-5, atol=1e-5)
    model(**given).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.adapters.parameters())


def test_a_method_for_each_group() -> None:
    given = inputs("smolvlm", ROWS)
    spec = {
        "image": {"method": "bitfit", "where": {"language": "A", "vision": "F"}},
        "text": {"method": "lora", "rank": 2},
    }
    model = adapted("smolvlm", spec)
    assert logits(model, given).isfinite().all()
    assert {"vision up", "vision down"} < model.num_trainable_parameters("role").keys()
    refused(
        "where: vision: its tokens have the group 'image'; name their context in contexts_from",
        spec={"image": {"method": "bitfit"}, "text": {"method": "lora", "where": {"vision": "F"}}},
        contexts_from={MEDIA: "image"},
    )


def test_a_group_that_all_tokens_share_acts_in_the_tower_too() -> None:
    """Where the groups of the contexts add nothing, all is as with one group alone."""
    given = inputs("llava", ROWS, dtype=torch.float64)
    spec = lora("llava", language="AF", tower="all", connector="all")
    stacked = adapted("llava", spec, small("llava", torch.float64), "shared+specific")
    alone = adapted("llava", spec, small("llava", torch.float64), "agnostic")
    (group,) = alone.spec.by_group
    shared = {name.replace(f"group_{stacked.spec.shared}", f"group_{group}"): p
              for name, p in stacked.adapters.named_parameters()}  # fmt: skip
    with torch.no_grad():
        for name, p in alone.adapters.named_parameters():
            p.copy_(shared[name])
        for name, p in stacked.adapters.named_parameters():
            if f"group_{stacked.spec.shared}" not in name:
                p.zero_()
    torch.testing.assert_close(logits(stacked, given), logits(alone, given), rtol=1e-9, atol=1e-9)


def test_text_alone_does_not_run_the_tower() -> None:
    model = adapted("llava", lora("llava", language="AF", tower="all"))
    ids_BT = torch.tensor([[1, 7, 8, 9]])
    assert logits(model, {"input_ids": ids_BT}).isfinite().all()


def test_the_tower_called_by_itself_has_no_layout() -> None:
    model = adapted("llava", lora("llava", tower="all"))
    with pytest.raises(UserError, match=r"layer model.vision_tower.* no layout was set"):
        model.base_model.get_image_features(pixel_values=torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("places", "match"),
    [
        ({"visoin": "AF"}, "unknown part 'visoin'; .*did you mean 'vision'"),
        ({}, "no part is named; allowed: some of language, vision, audio, connector"),
        ({"vision": ["x"]}, "where.vision: input should be 'A', 'F', 'AF' or 'all' or input should be 'q', .*'x'"),
        ({"connector": "AF"}, "where.connector: input should be 'all'; found 'AF'"),
        ({"audio": "AF"}, "where: audio: the llava model has no such part; allowed: connector, language, vision"),
        ({"vision": ["q", "gate"]}, "this part of the llava model has no layer with the role gate; it has down, k"),
    ],
)
def test_places_that_are_wrong_are_refused(places: dict[str, Any], match: str) -> None:
    refused(match, spec={"method": "lora", "where": places}, contexts_from={MEDIA: "image"})


@pytest.mark.parametrize(
    ("method", "places", "match"),
    [
        ("ia3", {"connector": "all"}, "this part of the llava model has no layer with the role .*; it has linear"),
        ("moka", {"vision": "AF"}, "MokA r=8 .* joins the tokens of several contexts"),
    ],
)
def test_methods_that_cannot_act_there_are_refused(method: str, places: dict[str, Any], match: str) -> None:
    refused(match, spec={"method": method, "where": places}, contexts_from={MEDIA: "image"})


def test_models_without_the_part_are_refused() -> None:
    refused("where: vision: the llama model has no such part that is known; .*llava", model=tiny_llama(),
            spec={"method": "lora", "where": {"vision": "A"}})  # fmt: skip
    refused("where: vision: its tokens have no adapter", spec={"method": "lora", "where": {"vision": "A"}})
    refused("where: vision: its tokens have no adapter", spec={"method": "lora", "where": {"vision": "A"}},
            grouping={"image": None, "text": "text"}, contexts_from={MEDIA: "image"})  # fmt: skip
    refused("that of the gemma3 model is a matrix that belongs to no linear layer", model=small("gemma3"),
            spec={"method": "lora", "where": {"connector": "all"}}, contexts_from={MEDIA: "image"})  # fmt: skip
    model = small("llava")
    model.model.vision_tower = torch.nn.Identity()
    refused("the layers of a Identity, which this llava model has, are not known", model=model,
            spec={"method": "lora", "where": {"vision": "A"}}, contexts_from={MEDIA: "image"})  # fmt: skip
