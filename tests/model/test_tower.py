"""``where`` by part in a trial: the tower in the step computes what ``harness.adapt`` makes of the class itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import harness
from harness.core.errors import UserError
from harness.model.build import Built, count_parameters
from harness.model.tower import Tower
from tasks.base import Example
from tests.support.adapters import disturb
from tests.support.trials import spec_of
from tests.support.vision_language import (
    CAPTIONS,
    KINDS,
    PROMPT,
    assert_shared_rows_are_rows_alone,
    each_kind,
    examples_of,
    make,
    nll_by_class,
    pictures,
    read_by_its_processor,
    save,
)

ALL = {"language": "AF", "vision": "all", "connector": "all"}
LORA = {"method": "lora", "rank": 2, "where": ALL, "grouping": "specific", "learning_rate": 6e-3}
# Gemma 3's connector has no layer that could have an adapter.
WITHOUT = {"gemma3": {"where": {"language": "AF", "vision": "all"}}}
FULL = {"method": "full", "parts": ["language", "vision", "connector"], "learning_rate": 3e-3}


def adapted(folder: Path, built: Built, spec: dict[str, Any]) -> harness.AdaptedModel:
    """The class itself with the adapters of a trial."""
    whole = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    token = {whole.config.image_token_id: "image"}
    found = harness.adapt(whole, spec, ("image", "text"), "specific", contexts_from=token)
    found.adapters.load_state_dict(built.model.adapters.state_dict())
    return found


@each_kind(KINDS)
def test_a_row_has_the_likelihood_of_the_adapted_class(kind: str, tmp_path: Path) -> None:
    own = WITHOUT.get(kind, {"where": ALL})
    spec, built = make(tmp_path, kind, LORA | own, prompt=PROMPT)
    disturb(built.model.adapters.parameters(), scale=0.2)
    paths = pictures(tmp_path)
    built.model.eval()
    batch = built.batches.make(examples_of(paths), CAPTIONS)
    nll_R, _ = built.model(batch)
    model = adapted(tmp_path / kind, built, {"method": "lora", "rank": 2, **own})
    expected = []
    for path, caption, ids_T in zip(paths, CAPTIONS, batch.context_ids_BT, strict=True):
        count = int(batch.mask_BT[len(expected)].sum())
        contexts = {"context_ids": ids_T[None, :count]}
        expected.append(nll_by_class(model, tmp_path / kind, path, PROMPT, caption, **contexts))
    torch.testing.assert_close(nll_R, torch.stack(expected), atol=2e-5, rtol=2e-5)
    nll_R.sum().backward()
    assert [name for name, p in built.model.adapters.named_parameters() if p.grad is None] == []
    assert {name for name, p in built.model.named_parameters() if p.grad is not None} == {
        f"adapters.{name}" for name, _ in built.model.adapters.named_parameters()
    }
    assert built.parameters == count_parameters(spec)


@each_kind(KINDS)
def test_rows_that_share_a_picture_have_the_same_likelihoods(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA | WITHOUT.get(kind, {}))
    assert_shared_rows_are_rows_alone(built, examples_of(pictures(tmp_path)))


@each_kind(KINDS)
def test_full_fine_tuning_of_the_same_parts_trains_all_of_them(kind: str, tmp_path: Path) -> None:
    spec, built = make(tmp_path, kind, FULL)
    paths = pictures(tmp_path)
    nll_R, _ = built.model(built.batches.make(examples_of(paths), CAPTIONS))
    nll_R.sum().backward()
    whole = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / kind)
    whole(**read_by_its_processor(tmp_path / kind, paths[0], PROMPT)).logits.sum().backward()
    # What nothing reads is left out, and what is of no part: LLaVA-NeXT's mark of a row's end.
    read = {name: p for name, p in whole.named_parameters() if p.grad is not None and "image_newline" not in name}
    assert built.parameters.trainable == sum(p.numel() for p in read.values())
    assert built.parameters.total == sum(p.numel() for p in whole.parameters())
    assert built.parameters == count_parameters(spec)
    assert [name for name, p in built.model.named_parameters() if p.requires_grad and p.grad is None] == []
    encoder = built.batches.features.encoders["image"]
    known = {p.data_ptr() for p in encoder.parameters()}
    assert not known & {p.data_ptr() for p in built.model.parameters() if p.requires_grad}  # others read these


def test_a_connector_that_is_trained_beside_a_tower_with_adapters(tmp_path: Path) -> None:
    where = {"language": "AF", "vision": ["q", "v"]}
    spec, built = make(tmp_path, "llava_onevision", {**LORA, "where": where}, connector="trained")
    nll_R, _ = built.model(built.batches.make(examples_of(pictures(tmp_path)), CAPTIONS))
    nll_R.sum().backward()
    (tower,) = {own for own in built.model.modules() if isinstance(own, Tower)}
    assert all(p.grad is not None and p.grad.any() for p in tower.connector.parameters())
    assert built.parameters.trainable == built.parameters.adapter + built.parameters.projector
    assert built.parameters == count_parameters(spec)


def test_a_batch_without_a_picture_has_gradients_too(tmp_path: Path) -> None:
    _, built = make(tmp_path, "idefics3", LORA)
    disturb(built.model.adapters.parameters())
    nll_R, _ = built.model(built.batches.make([Example("0", (), ("yes",))], ["yes"]))
    nll_R.sum().backward()
    grads = {name: p.grad for name, p in built.model.adapters.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None] == []
    assert not any(grad.any() for name, grad in grads.items() if "vision_model" in name and grad is not None)


def test_a_tower_in_bf16_has_adapters_in_fp32(tmp_path: Path) -> None:
    _, built = make(tmp_path, "llava", LORA, dtype="bf16")
    nll_R, _ = built.model(built.batches.make(examples_of(pictures(tmp_path)), CAPTIONS))
    nll_R.sum().backward()
    (tower,) = {own for own in built.model.modules() if isinstance(own, Tower)}
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in built.model.adapters.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.model.adapters.parameters())


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"where": {"audio": "all"}},
            "where: audio: the llava model has no such part; allowed: connector, language, vision",
        ),
        ({"where": {"vision": ["gate"]}}, "where: vision: this part .* no layer with the role gate"),
        ({"method": "moka", "where": {"vision": "AF"}}, "where: vision: .* joins the tokens of several contexts"),
        (
            {"method": "lora+soft_prompt", "where": {"vision": "AF"}},
            "changes the language model as a whole too, which is not done beside a tower; allowed: ",
        ),
        ({"grouping": {"image": None, "text": "text"}}, r"where: vision: its tokens have no adapter of .*LoRA"),
    ],
)
def test_parts_that_cannot_have_the_adapter_are_refused(adapter: dict[str, Any], message: str, tmp_path: Path) -> None:
    save("llava", tmp_path / "llava")
    with pytest.raises(UserError, match=message):
        count_parameters(spec_of(tmp_path, {**LORA, **adapter}, backbone={"model": "llava"}))


def test_parts_are_those_of_a_whole_model(tmp_path: Path) -> None:
    for adapter in (LORA, FULL):
        with pytest.raises(UserError, match="where: vision: the llama model has no such part that is known"):
            count_parameters(spec_of(tmp_path, adapter))


def test_ids_tell_the_parts_of_full_fine_tuning_and_are_as_before_without_them(tmp_path: Path) -> None:
    plain = spec_of(tmp_path, {"method": "full", "learning_rate": 3e-3})
    assert plain.adapter.config == {"embeddings": True}
    assert plain.adapter.label == "full fine-tuning"
    save("llava", tmp_path / "llava")
    parts = spec_of(tmp_path, FULL, backbone={"model": "llava"})
    assert parts.adapter.config == {"embeddings": True, "parts": ["language", "vision", "connector"]}
    assert parts.adapter.label == "full fine-tuning of language, vision, connector"
