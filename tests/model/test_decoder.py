"""Decoders in which pictures (Gemma 3) or prompts (PaliGemma) see themselves as a whole, with what acts on masks.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import harness
from harness.core.errors import UserError
from harness.experiment.sections import Backbone, Resources
from harness.model import vision_language
from harness.model.budget import Draw
from harness.model.build import Built, build, common_of, compute_as
from harness.model.joint import JointModel
from harness.model.turn import Turn
from harness.price.rows import rows_of
from harness.price.trace import trace
from harness.sweep.preflight import check_models
from tasks.base import Example, Part
from tests.support.adapters import disturb
from tests.support.trials import spec_of
from tests.support.vision_language import (
    CAPTIONS,
    PROMPT,
    examples_of,
    make,
    nll_by_class,
    picture,
    pictures,
    read_by_its_processor,
    save,
)

LORA = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
BOTH_WAYS = ("gemma3", "paligemma", "paligemma2")
each_class = pytest.mark.parametrize("kind", BOTH_WAYS)


def class_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()


def adapted_class(folder: Path, built: Built, spec: dict[str, Any], grouping: Any) -> harness.AdaptedModel:
    """The class itself with the adapters of a trial, whose layers have other names there."""
    whole = class_of(folder)
    found = harness.adapt(
        whole, spec, ("image", "text"), grouping, contexts_from={whole.config.image_token_id: "image"}
    )
    state = built.model.adapters.state_dict()
    names = {name: name.replace("layers.model/", "layers.model/language_model/") for name in state}
    found.adapters.load_state_dict({names[name]: x for name, x in state.items()})
    return found


def nll(built: Built, examples: list[Example], captions: list[str] = CAPTIONS) -> Tensor:
    with torch.no_grad():
        found_R, _ = built.model.eval()(built.batches.make(examples, captions))
    return found_R


@each_class
def test_rows_are_those_of_the_class_in_float64(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / kind)
    config = json.loads((folder / "config.json").read_text())
    if kind != "paligemma":
        config["text_config"]["sliding_window"] = 12  # of a layer: less than a prompt
    (folder / "config.json").write_text(json.dumps(config))
    _, built = make(tmp_path, kind, LORA, prompt=PROMPT)
    paths = pictures(tmp_path)
    language_model = built.model.language_model.double()
    built.model.adapters.detach()
    batch = built.batches.make(examples_of(paths), CAPTIONS)
    whole = class_of(folder, torch.float64)
    embeds_BTD = built.model.embed(batch)
    for number, path in enumerate(paths):
        read = read_by_its_processor(folder, path, PROMPT)
        length, types_T = read["input_ids"].shape[1], read["token_type_ids"][0]
        marked_T = types_T == 1 if kind == "gemma3" else types_T == 0
        assert batch.both_ways_BT is not None
        assert torch.equal(batch.both_ways_BT[number, :length], marked_T)
        assert not batch.both_ways_BT[number, length:].any()
        features = whole.model.get_image_features(read["pixel_values"].double()).pooler_output
        row_BTD = embeds_BTD[number : number + 1, :length].clone()
        row_BTD[:, read["input_ids"][0] == whole.config.image_token_id, :-1] = features
        causal_BTD = row_BTD.clone()
        causal_BTD[..., -1] = 0
        with torch.no_grad():
            expected = whole(**{k: x.double() if x.is_floating_point() else x for k, x in read.items()}).logits
            found = language_model(inputs_embeds=row_BTD).logits
            causal = language_model(inputs_embeds=causal_BTD).logits
        # Gemma's norms compute in float32 whatever they are given.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
        assert not torch.allclose(causal, expected, rtol=1e-3, atol=1e-3)


@each_class
@pytest.mark.parametrize(
    ("adapter", "grouping"),
    [
        ({"method": "lora", "rank": 2}, "specific"),
        ({"method": "moka", "rank": 2}, "specific"),
        ({"method": "mmca+lora", "rank": 2}, "specific"),
        ({"method": "mmca+lora", "non_text_attention": "own_context", "rank": 2}, "specific"),
    ],
    ids=["lora", "moka", "mmca", "mmca_of_own_context"],
)
def test_methods_compute_what_they_compute_in_the_class(
    kind: str, adapter: dict[str, Any], grouping: Any, tmp_path: Path
) -> None:
    given = {**adapter, "grouping": grouping, "learning_rate": 1e-3}
    if kind == "paligemma2" and "mmca" in adapter["method"]:
        with pytest.raises(UserError, match=r"mmca cannot replace .* of a gemma2 model, which caps its logits"):
            make(tmp_path, kind, given)
        return
    _, built = make(tmp_path, kind, given, prompt=PROMPT)
    disturb(built.model.adapters.parameters(), scale=0.2)
    paths, folder = pictures(tmp_path), tmp_path / kind
    whole = adapted_class(folder, built, adapter, grouping)
    batch = built.batches.make(examples_of(paths), CAPTIONS)
    expected = [
        nll_by_class(whole, folder, path, PROMPT, caption, context_ids=ids_T[None, : int(mask_T.sum())])
        for path, caption, ids_T, mask_T in zip(paths, CAPTIONS, batch.context_ids_BT, batch.mask_BT, strict=True)
    ]
    torch.testing.assert_close(nll(built, examples_of(paths)), torch.stack(expected), atol=2e-5, rtol=2e-5)


@each_class
def test_soft_prompts_are_refused_before_compute(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    spec = spec_of(tmp_path, {"method": "soft_prompt", "learning_rate": 1e-2}, backbone={"model": "model"})
    with pytest.raises(UserError, match=r"soft_prompt cannot be used with .*the tokens of a picture see each other"):
        check_models([spec])


@each_class
def test_attention_without_a_mask_is_refused_before_compute(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    spec = spec_of(tmp_path, LORA, backbone={"model": "model"})
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(UserError, match=r"attn_implementation: .* see themselves as a whole, which needs a mask"):
            check_models([spec], Resources(attn_implementation=name))
    check_models([spec], Resources(attn_implementation="eager"))


@each_class
@pytest.mark.parametrize("resources", [{"attn_implementation": "eager"}, {"gradient_checkpointing": True}], ids=str)
def test_other_ways_to_compute_give_the_same(kind: str, resources: dict[str, Any], tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA, prompt=PROMPT)
    disturb(built.model.adapters.parameters())
    batch = built.batches.make(examples_of(pictures(tmp_path)), CAPTIONS)

    def step() -> list[Tensor]:
        built.model.train()
        nll_R, _ = built.model(batch)
        return [nll_R.detach(), *torch.autograd.grad(nll_R.sum(), list(built.model.adapters.parameters()))]

    expected = step()
    compute_as(built.model.language_model, Resources(**resources))
    for found, other in zip(step(), expected, strict=True):
        torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-4)


@each_class
def test_a_cache_of_a_fixed_size_gives_the_same_texts(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA, prompt=PROMPT)
    prompts = built.batches.prompts(examples_of(pictures(tmp_path)))
    eos, model = built.batches.language_model.eos_id, built.model.eval()
    expected = model.generate(prompts, "text", 8, eos)
    assert (expected != expected[:, :1]).any()
    model.language_model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(prompts, "text", 8, eos), expected)


@each_class
@pytest.mark.parametrize("shared", [False, True], ids=["rows alone", "rows that share"])
def test_several_models_in_one_pass_compute_what_each_does_alone(kind: str, shared: bool, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    specs = [spec_of(tmp_path, {**LORA, "rank": rank}, backbone={"model": "model"}) for rank in (2, 3)]
    common = common_of(specs[0], torch.device("cpu"))
    models = [build(spec, torch.device("cpu"), common=common).model.eval() for spec in specs]
    for seed, model in enumerate(models):
        disturb(model.adapters.parameters(), seed)
    first, second, _ = examples_of(pictures(tmp_path))
    rows = [[(first, "a red circle"), (first, "yes")], [(second, "no")]]
    batch = common.batches.make_shared(rows) if shared else common.batches.make([first, second], ["a circle", "no"])
    found = JointModel(common.language_model.model).score(batch, models, [nullcontext] * 2)
    for model, (nll_R, _) in zip(models, found, strict=True):
        torch.testing.assert_close(nll_R, model(batch)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*BOTH_WAYS, "llava_onevision"])  # whose towers look at values when they are made
def test_a_step_is_foretold(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    spec = spec_of(tmp_path, LORA, backbone={"model": "model", "prompt": PROMPT})
    (traced,) = trace(spec, rows_of(spec, None).first)
    assert traced.step_flops > 0


@each_class
def test_two_pictures_of_a_row_see_themselves_alone(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA, prompt=PROMPT)
    first, second = picture(tmp_path / "a.png", 44, 30), picture(tmp_path / "b.png", 30, 44)
    example = Example("0", (Part("image", first), Part("image", second)), ("yes",))
    folder, content = tmp_path / kind, [{"type": "image"}, {"type": "image"}, {"type": "text", "text": PROMPT}]
    processor = vision_language.load_processor(Backbone(model=str(folder)))
    turn = f"{processor.image_token}{processor.image_token}{PROMPT}"
    if processor.chat_template:
        turn = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    items = [built.batches.features.modalities["image"].load(path) for path in (first, second)]
    read = processor(images=[items], text=[turn], return_tensors="pt")
    batch = built.batches.prompts([example])
    read.pop("labels", None)
    whole = class_of(folder)
    expected = torch.where(read["input_ids"] == whole.config.image_token_id, 0, read["input_ids"])
    assert torch.equal(batch.token_ids_BT, expected)
    with torch.no_grad():
        built.model.adapters.detach()
        found = built.model.language_model(inputs_embeds=built.model.embed(batch)).logits
        torch.testing.assert_close(found, whole(**read).logits, atol=1e-5, rtol=1e-5)


def test_tokens_that_reach_over_the_end_of_a_picture_are_of_what_they_begin_in(tmp_path: Path) -> None:
    backbone = Backbone(model=str(save("gemma3", tmp_path / "model")), prompt="Answer:")
    turn = Turn(vision_language.load_processor(backbone), backbone)
    pieces = turn.pieces((Part("image", tmp_path / "0.png"), Part("question", "Is it red?")), ["Is it red?"])
    found = [(piece.input, piece.ids and turn.tokenizer.decode(piece.ids)) for piece in pieces]
    # The processor writes two line breaks before and after a picture, and the template one.
    assert found == [
        (None, "USER: \n\n\n"), (0, None), (0, "\n\n\n"), (1, "Is it red?"), (None, "\nAnswer: ASSISTANT:"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["paligemma", "paligemma2"])
def test_prompts_that_see_themselves_are_shared_as_a_whole_or_not_at_all(kind: str, tmp_path: Path) -> None:
    """Questions about one picture are prompts of their own: the picture sees its question."""
    _, built = make(tmp_path, kind, LORA)
    disturb(built.model.adapters.parameters())
    path = picture(tmp_path / "a.png", 44, 30)
    examples = [
        Example(str(n), (Part("image", path), Part("text", text)), ("yes", "no"))
        for n, text in enumerate(["Is it red?", "What is on it?"])
    ]
    draws = [Draw(example, reference, 0) for example in (0, 1) for reference in (0, 1)]
    with torch.no_grad():
        shared, alone = (built.batches.train(examples, draws, share) for share in (True, False))
        assert len(shared.token_ids_BT) == 2
        found_R, expected_R = (built.model.eval()(batch)[0] for batch in (shared, alone))
    torch.testing.assert_close(found_R, expected_R, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="whose tokens all see each other is shared as a whole or not at all"):
        built.batches.make_shared([[(example, "yes") for example in examples]])


def test_a_prompt_without_a_picture_is_begun_as_the_class_begins_it(tmp_path: Path) -> None:
    backbone = Backbone(model=str(save("paligemma", tmp_path / "model")), prompt="caption en")
    turn = Turn(vision_language.load_processor(backbone), backbone)
    pieces = turn.pieces((Part("image", tmp_path / "0.png"), Part("text", "Is it red?")), ["Is it red?"])
    assert [(one.input, one.ids and turn.tokenizer.decode(one.ids)) for one in pieces] == [
        (0, None), (None, "<s>"), (1, "Is it red?"), (None, "caption en\n"),
    ]  # fmt: skip
    (only,) = turn.pieces((), [])
    assert turn.tokenizer.decode(only.ids) == "<s>caption en\n"
