"""Audio-language models: the logits of a trial's rows are those of each class's own forward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

import harness
from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Backbone
from harness.model import vision_language
from harness.model.backbones import build_empty
from harness.model.build import Built, build, count_parameters
from harness.model.components import empty_encoders, make_encoder
from harness.model.own_encoder import Written
from harness.model.tower import Tower
from harness.model.turn import Turn
from tasks.base import Example, Part
from tasks.modalities.audio import Audio
from tests.support.adapters import disturb
from tests.support.audio_language import KINDS, PROMPT, data, each_kind, recordings, save
from tests.support.trials import spec_of
from tests.support.vision_language import assert_shared_rows_are_rows_alone
from tests.support.vlms import small

LORA = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
ALL = {"language": "AF", "audio": "all", "connector": "all"}
TARGETS = ["seven", "zero two", "yes"]


def make(tmp_path: Path, kind: str, adapter: Mapping[str, Any] = LORA, **backbone: Any) -> tuple[TrialSpec, Built]:
    """A trial's model on a saved one."""
    if not (folder := tmp_path / kind).exists():
        save(kind, folder)
        data(tmp_path / "data", {"train": 4, "validation": 2, "test": 2})
    own = {"name": "speech", "root": str(tmp_path / "data")}
    spec = spec_of(tmp_path, adapter, task=own, backbone={"model": str(folder), **backbone}, budget={"examples": 4})
    return spec, build(spec, torch.device("cpu"))


def examples_of(paths: list[Path]) -> list[Example]:
    return [Example(str(n), (Part("audio", path),), (TARGETS[n],)) for n, path in enumerate(paths)]


def whole(folder: Path) -> Any:
    """The class's own model."""
    config = hf.AutoConfig.from_pretrained(folder)
    kind = getattr(hf, config.architectures[0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def read_by_its_processor(folder: Path, recording: Path) -> Any:
    """The ids and spectrograms of a whole turn."""
    processor = hf.AutoProcessor.from_pretrained(folder)
    content = [{"type": "audio"}, {"type": "text", "text": PROMPT}]
    turn = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    samples, _ = soundfile.read(recording, dtype="float32")
    return processor(text=[turn], audio=[samples], return_tensors="pt")


def expected_nll(
    folder: Path, recording: Path, target: str, adapted: Any = None, context_ids_T: Tensor | None = None
) -> Tensor:
    """By the class's own forward, with adapters or without."""
    read = read_by_its_processor(folder, recording)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
    length = read["input_ids"].shape[1]
    whole_BT = torch.cat([read["input_ids"], ids], dim=1)
    extra = {name: x for name, x in read.items() if name not in ("input_ids", "attention_mask")}
    if context_ids_T is not None:
        extra["context_ids"] = context_ids_T[None, : whole_BT.shape[1]]
    with torch.no_grad():
        model = adapted or whole(folder)
        logits = model(input_ids=whole_BT, attention_mask=torch.ones_like(whole_BT), **extra).logits
    return F.cross_entropy(logits[0, length - 1 : -1], ids[0], reduction="sum")


def assert_as_the_class(built: Built, folder: Path, paths: list[Path]) -> Tensor:
    """Rows have the likelihoods of the class's own forward; returns them."""
    built.model.eval()
    with torch.no_grad():
        found_R, _ = built.model(built.batches.make(examples_of(paths), TARGETS))
    pairs = zip(paths, TARGETS, strict=True)
    expected_R = torch.stack([expected_nll(folder, path, target) for path, target in pairs])
    torch.testing.assert_close(found_R, expected_R, atol=1e-5, rtol=1e-5)
    made: Tensor = found_R
    return made


@each_kind(KINDS)
def test_a_row_has_the_likelihood_that_the_class_gives_it(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, prompt=PROMPT)  # an adapter that is not trained changes nothing
    paths = recordings(tmp_path)
    found_R = assert_as_the_class(built, tmp_path / kind, paths)
    others_R, _ = built.model(built.batches.make(examples_of(paths[::-1]), TARGETS))
    assert not torch.allclose(others_R[0], found_R[0], atol=1e-3), "what is heard does not matter"


@each_kind(KINDS)
def test_rows_that_share_a_recording_have_the_same_likelihoods(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind)
    assert_shared_rows_are_rows_alone(built, examples_of(recordings(tmp_path)))


@each_kind(KINDS)
def test_texts_are_those_that_the_class_generates(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, prompt=PROMPT)
    paths = recordings(tmp_path)
    built.model.eval()
    prompts, eos = built.batches.prompts(examples_of(paths)), built.batches.language_model.eos_id
    found = {beams: built.model.generate(prompts, "text", 8, eos, num_beams=beams) for beams in (1, 2)}
    model = whole(tmp_path / kind)
    for number, path in enumerate(paths):
        read = read_by_its_processor(tmp_path / kind, path)
        for beams, ids_BN in found.items():
            with torch.no_grad():
                ids = model.generate(**read, max_new_tokens=8, do_sample=False, num_beams=beams, eos_token_id=eos)
            expected, own = ids[0, read["input_ids"].shape[1] :].tolist(), ids_BN[number].tolist()
            assert own[: len(expected)] == expected
            assert set(own[len(expected) :]) <= {eos}


@each_kind(KINDS)
def test_a_row_has_the_likelihood_of_the_adapted_class(kind: str, tmp_path: Path) -> None:
    spec, built = make(tmp_path, kind, {**LORA, "where": ALL}, prompt=PROMPT)
    disturb(built.model.adapters.parameters(), scale=0.2)
    paths = recordings(tmp_path)
    built.model.eval()
    batch = built.batches.make(examples_of(paths), TARGETS)
    nll_R, _ = built.model(batch)
    model = whole(tmp_path / kind)
    token = {model.config.audio_token_id: "audio"}
    adapter = {"method": "lora", "rank": 2, "where": ALL}
    own = harness.adapt(model, adapter, ("audio", "text"), "specific", contexts_from=token)
    own.adapters.load_state_dict(built.model.adapters.state_dict())
    expected = [
        expected_nll(tmp_path / kind, path, target, own, ids_T)
        for path, target, ids_T in zip(paths, TARGETS, batch.context_ids_BT, strict=True)
    ]
    torch.testing.assert_close(nll_R, torch.stack(expected), atol=2e-5, rtol=2e-5)
    nll_R.sum().backward()
    assert [name for name, p in built.model.adapters.named_parameters() if p.grad is None] == []
    assert built.parameters == count_parameters(spec)


def test_a_tower_keeps_the_statistics_of_its_batch_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small("granite_speech").model
    model.language_model = torch.nn.Module()
    tower = Tower(model, "language_model", "projector", [], {}).train()
    (own, *_) = (m for m in tower.modules() if isinstance(m, torch.nn.BatchNorm1d))
    before = own.running_mean.clone()
    own(torch.randn(2, own.num_features, 8))
    assert torch.equal(own.running_mean, before)
    assert tower.training


@each_kind(KINDS)
def test_what_stands_at_a_recordings_place_is_known_without_weights(kind: str, tmp_path: Path) -> None:
    backbone = Backbone(model=str(save(kind, tmp_path / kind)))
    items = [Audio().load(path) for path in recordings(tmp_path)]
    full = make_encoder(backbone, "audio", Audio()).encode(items)
    empty = make_encoder(backbone, "audio", Audio(), weights=False).encode(items)
    assert [Written.of(x).ids for x in full] == [Written.of(x).ids for x in empty]
    assert [x.shape for x in full] == [x.shape for x in empty]


@each_kind(KINDS)
def test_every_parameter_is_counted_once(kind: str, tmp_path: Path) -> None:
    spec, built = make(tmp_path, kind)
    model = whole(tmp_path / kind)
    counted = built.parameters
    connector = model.model.get_submodule(vision_language.KINDS[kind].connector)
    assert counted == count_parameters(spec)
    assert counted.projector == sum(p.numel() for p in connector.parameters())
    assert counted.total - counted.adapter == sum(p.numel() for p in model.parameters())


@each_kind(KINDS)
def test_recordings_that_a_model_would_cut_or_not_hear_are_refused(kind: str, tmp_path: Path) -> None:
    encoder = make_encoder(Backbone(model=str(save(kind, tmp_path / kind))), "audio", Audio(), weights=False)
    short, fits, long = (Audio().load(path) for path in recordings(tmp_path, (0.001, 1.0, 1.5)))
    assert encoder.check(fits) is None
    if kind == "qwen2_audio":
        assert encoder.check(long) == "1.5 s long; qwen2_audio takes at most 1 s"
    else:
        assert encoder.check(long) is None  # in parts
    assert kind == "granite_speech" or "1.0 ms long; " in str(encoder.check(short))


@each_kind(k for k in KINDS if k in ("glmasr", "audioflamingo3"))
def test_recordings_longer_than_a_window_are_read_in_parts(kind: str, tmp_path: Path) -> None:
    _, built = make(tmp_path, kind, prompt=PROMPT)
    assert_as_the_class(built, tmp_path / kind, recordings(tmp_path, (2.5, 1.0, 3.0)))


def test_a_turn_without_a_template_is_what_the_processor_writes(tmp_path: Path) -> None:
    backbone = Backbone(model=str(save("glmasr", tmp_path / "glmasr", template=False)), prompt=PROMPT)
    turn = Turn(vision_language.load_processor(backbone), backbone)
    pieces = turn.pieces((Part("audio", tmp_path / "0.wav"),), [])
    assert [piece.input for piece in pieces if piece.ids != turn.tokenizer("").input_ids] == [0, None]
    assert turn.tokenizer.decode(pieces[-1].ids) == PROMPT


def test_a_model_of_another_medium_than_the_task_is_refused(tmp_path: Path) -> None:
    folder = save("glmasr", tmp_path / "glmasr")
    spec = spec_of(tmp_path, LORA, backbone={"model": str(folder)})
    message = (
        r"backbone\.encoders\.image: .*glmasr.* \(glmasr\) reads audio, but the task has image; allowed: a task of"
    )
    with pytest.raises(UserError, match=message):
        empty_encoders(spec)


def test_a_class_whose_processor_takes_no_recordings_is_refused(tmp_path: Path) -> None:
    hf.VoxtralConfig().save_pretrained(tmp_path / "voxtral")
    with pytest.raises(UserError, match="'voxtral': its processor reads recordings only as mistral-common arranges"):
        build_empty(Backbone(model=str(tmp_path / "voxtral")))


def test_a_model_with_an_adapter_of_its_own_is_refused(tmp_path: Path) -> None:
    hf.GraniteSpeechConfig(has_lora_adapter=True).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has a LoRA adapter of its own for recordings, .* has_lora_adapter: false"):
        build_empty(Backbone(model=str(tmp_path)))


def test_a_connector_of_recordings_is_not_trained_apart(tmp_path: Path) -> None:
    make(tmp_path, "qwen2_audio")
    with pytest.raises(UserError, match="that of 'qwen2_audio' needs more than its features"):
        make(tmp_path, "qwen2_audio", connector="trained")
