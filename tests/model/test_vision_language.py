"""Vision-language models: the logits of a trial's rows are those of each class's own forward."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model import vision_language
from harness.model.backbones import build_empty, load_language_model
from harness.model.build import count_parameters
from harness.model.components import make_encoder
from harness.model.grid_positions import positions_of
from harness.model.own_encoder import IMAGE, Written
from harness.model.turn import Turn
from tasks.base import Part
from tasks.modalities.image import Image as ImageModality
from tests.support.trials import spec_of
from tests.support.vision_language import (
    CAPTIONS,
    KINDS,
    NONE,
    PROMPT,
    assert_shared_rows_are_rows_alone,
    class_of,
    each_kind,
    examples_of,
    make,
    nll_by_class,
    picture,
    pictures,
    read_by_its_processor,
    save,
    tokenizer,
)

LORA = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}


@each_kind(KINDS)
def test_a_row_has_the_likelihood_that_the_class_gives_it(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA, prompt=PROMPT)  # an adapter that is not trained changes nothing
    paths = pictures(tmp_path)
    built.model.eval()
    with torch.no_grad():
        found_R, _ = built.model(built.batches.make(examples_of(paths), CAPTIONS))
    pairs = zip(paths, CAPTIONS, strict=True)
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / kind, dtype=torch.float32).eval()
    expected_R = torch.stack([nll_by_class(model, tmp_path / kind, path, PROMPT, caption) for path, caption in pairs])
    torch.testing.assert_close(found_R, expected_R, atol=1e-5, rtol=1e-5)


@each_kind(kind for kind in KINDS if class_of(kind).rows)
def test_a_connector_that_is_trained_begins_as_that_of_the_model(kind: str, tmp_path: Path) -> None:
    examples = examples_of(pictures(tmp_path))
    losses = []
    for connector in ("frozen", "trained"):
        _, built = make(tmp_path, kind, LORA, connector=connector)
        nll_R, _ = built.model.eval()(built.batches.make(examples, CAPTIONS))
        losses.append(nll_R)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    losses[1].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in built.model.projectors.parameters())


@each_kind(KINDS)
def test_rows_that_share_a_picture_have_the_same_likelihoods(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA)
    assert_shared_rows_are_rows_alone(built, examples_of(pictures(tmp_path)))


@each_kind(KINDS)
def test_texts_are_those_that_the_class_generates(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, LORA, prompt=PROMPT)
    folder, paths = tmp_path / kind, pictures(tmp_path)
    built.model.eval()
    prompts = built.batches.prompts(examples_of(paths))
    eos = built.batches.language_model.eos_id
    found_BN = built.model.generate(prompts, "text", 8, eos)
    found = {1: found_BN}
    if class_of(kind).grid:
        with pytest.raises(UserError, match=r"which beams and .* do not know; allowed: eval\.num_beams: 1"):
            built.model.generate(prompts, "text", 8, eos, num_beams=2)
    else:
        found[2] = built.model.generate(prompts, "text", 8, eos, num_beams=2)
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for number, path in enumerate(paths):
        read = read_by_its_processor(folder, path, PROMPT)
        for beams, ids_BN in found.items():
            with torch.no_grad():
                ids = model.generate(**read, max_new_tokens=8, do_sample=False, num_beams=beams, eos_token_id=eos)
            expected = ids[0, read["input_ids"].shape[1] :].tolist()
            own = ids_BN[number].tolist()
            assert own[: len(expected)] == expected
            assert set(own[len(expected) :]) <= {eos}


def test_positions_tell_rows_and_columns_and_go_on_after_the_larger_side() -> None:
    found, following = positions_of([(2, None), (6, (2, 3)), (1, None)])
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert following == 6


def test_a_question_within_a_turn_has_a_context_of_its_own(tmp_path: Path) -> None:
    folder = save("idefics3", tmp_path / "idefics3")
    backbone = Backbone(model=str(folder), prompt="Answer:")
    turn = Turn(vision_language.load_processor(backbone), backbone)
    path = picture(tmp_path / "0.png", 44, 30)
    pieces = turn.pieces((Part("image", path), Part("question", "Is it red?")), ["Is it red?"])
    assert [piece.input for piece in pieces] == [None, 0, None, 1, None]
    read = turn.tokenizer.decode
    assert [read(piece.ids) for piece in pieces if piece.ids] == ["USER: ", "\n", "Is it red?", "\nAnswer: ASSISTANT:"]
    (rows_ND,) = make_encoder(backbone, "image", ImageModality()).encode([ImageModality().load(path)])
    image = Written.of(rows_ND).ids
    marks = [turn.processor.image_token_id if token == IMAGE else token for token in image]
    ids = [token for piece in pieces for token in (marks if piece.ids is None else piece.ids)]
    content = [{"type": "image"}, {"type": "text", "text": "Is it red?"}, {"type": "text", "text": "Answer:"}]
    turned = turn.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert ids == turn.processor(images=[Image.open(path)], text=[turned])["input_ids"][0]
    assert turn.cut("Is it red?", 2) == turn.tokenizer.decode(turn.tokenizer("Is it red?")["input_ids"][:2])


@each_kind(KINDS)
def test_what_stands_at_a_pictures_place_is_known_without_weights(kind: str, tmp_path: Path) -> None:
    backbone = Backbone(model=str(save(kind, tmp_path / kind)))
    items = [ImageModality().load(path) for path in pictures(tmp_path)]
    for connector in ("frozen", "trained"):
        if connector == "trained" and not class_of(kind).rows:
            continue
        own = backbone.model_copy(update={"connector": connector})
        full = make_encoder(own, "image", ImageModality()).encode(items)
        empty = make_encoder(own, "image", ImageModality(), weights=False).encode(items)
        assert [Written.of(x).ids for x in full] == [Written.of(x).ids for x in empty]
        assert [x.shape for x in full] == [x.shape for x in empty]


@each_kind(KINDS)
def test_every_parameter_is_counted_once(kind: str, tmp_path: Path) -> None:
    spec, built = make(tmp_path, kind, LORA)
    model = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / kind)
    counted = built.parameters
    connector = model.model.get_submodule(class_of(kind).connector)
    assert counted == count_parameters(spec)
    assert counted.projector == sum(p.numel() for p in connector.parameters())
    assert counted.total - counted.adapter == sum(p.numel() for p in model.parameters())
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    assert counted.language_model == sum(p.numel() for p in text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit", "is of the class 'vit', which is no vision- or audio-language model; allowed: .*a language model is"),
        ("blip", "is of the class 'blip', whose rows were never compared with its own forward; allowed: "),
    ],
)
def test_a_model_of_another_kind_is_refused(name: str, message: str, tmp_path: Path) -> None:
    configs = {"vit": hf.ViTConfig, "blip": hf.BlipConfig}
    configs[name]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        build_empty(Backbone(model=str(tmp_path)))


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"down_proj\.weight has the shape \(32, 48\) in its weights, but \(32, 64\) by"
    ):
        load_language_model(Backbone(model=str(folder)))


def test_a_checkpoint_without_its_tower_is_refused(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "llava")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if "vision" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing: model\.vision_tower.* and \d+ more"):
        load_language_model(Backbone(model=str(folder)))


def test_a_processor_without_an_image_token_is_refused(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "llava")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"image_token": "<picture>"}))
    with pytest.raises(UserError, match=r"processor writes token \d+ for a picture, and its config\.json names \d+"):
        vision_language.load_processor(Backbone(model=str(folder)))
    hf.CLIPProcessor(hf.CLIPImageProcessorPil(), hf.AutoTokenizer.from_pretrained(folder)).save_pretrained(
        folder
    )  # of another class
    with pytest.raises(UserError, match=r"its processor \(CLIPProcessor\) has no image token; allowed: the processor"):
        vision_language.load_processor(Backbone(model=str(folder)))


def test_a_model_without_its_processor_is_refused(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "llava")
    (folder / "processor_config.json").unlink()
    message = "its processor could not be loaded: Can't load image processor .*; allowed: the processor that the model"
    with pytest.raises(UserError, match=message):
        vision_language.load_processor(Backbone(model=str(folder)))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_whose_library_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    kind = KINDS["mistral3"]
    made = tokenizer(kind.tokens, kind.named)
    for part in (kind.model(made), made, hf.PixtralImageProcessorPil()):
        part.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    with pytest.raises(UserError, match="PixtralProcessor requires the Torchvision library but it was not found"):
        count_parameters(spec_of(tmp_path, LORA, backbone={"model": str(tmp_path)}))


def test_a_processor_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save("llava", tmp_path / "llava")
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"patch_size": 8}))
    encoder = make_encoder(Backbone(model=str(folder)), "image", ImageModality())
    with pytest.raises(ValueError, match="makes 16 features of pictures for which its processor writes 4 tokens"):
        encoder.encode([Image.new("RGB", (20, 20))])


def test_keys_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    def refused(message: str, **backbone: Any) -> None:
        with pytest.raises(UserError, match=message):
            spec_of(tmp_path, NONE, backbone=backbone)

    folder = str(save("llava", tmp_path / "llava", template=False))
    refused("backbone.language_model: found with backbone.model", model=folder, language_model="builtin/tiny-llama")
    refused("backbone.projector: found with backbone.model", model=folder, projector="mlp")
    refused("backbone.connector: it is that of backbone.model, which is missing", connector="trained")
    with pytest.raises(UserError, match=r"backbone\.model: found .*reads images or .* but task trends has series"):
        spec_of(tmp_path, NONE, backbone={"model": folder}, task="trends")
    nothing = spec_of(tmp_path, NONE, backbone={"model": folder})
    with pytest.raises(UserError, match=r"it trains nothing: .*allowed: backbone: \{connector: trained\}"):
        count_parameters(nothing)
    templated = Backbone(model=folder, chat_template=True)
    with pytest.raises(UserError, match="has no chat template; allowed: false"):
        Turn(vision_language.load_processor(templated), templated)


def test_a_connector_of_several_levels_is_not_trained_apart(tmp_path: Path) -> None:
    save("qwen3_vl", tmp_path / "model")
    with pytest.raises(UserError, match=r"backbone\.connector: 'qwen3_vl' has one for each of its 2 levels .* frozen"):
        count_parameters(spec_of(tmp_path, LORA, backbone={"model": "model", "connector": "trained"}))


def test_a_trials_id_tells_whether_the_connector_is_trained(tmp_path: Path) -> None:
    folder = str(save("llava", tmp_path / "llava"))
    plain, same, other, untemplated = (
        spec_of(tmp_path, LORA, backbone={"model": folder, **extra}).trial_id
        for extra in ({}, {"connector": "frozen"}, {"connector": "trained"}, {"chat_template": False})
    )
    assert plain == same
    assert len({plain, other, untemplated}) == 3
