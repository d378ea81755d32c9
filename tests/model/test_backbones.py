"""Language models of other families: saved with random weights, loaded and run like the built-in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from harness.core import hub
from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model import backbones
from harness.model.frame import frame_of
from tests.support.models import tiny_gpt2, tiny_llama, tiny_neox, tiny_opt

WORDS = ["a", "red", "blue", "circle", "square", "is", "left", "of", "the"]


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no retries


# ── Language models


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=16,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )


def save_tokenizer(folder: Path, **special: str) -> None:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


def started_by(language_model: backbones.LanguageModel) -> int:
    (token,) = frame_of(language_model.tokenizer, Backbone()).before
    return token


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.usefixtures("_offline")
def test_a_saved_language_model_is_loaded_exactly(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path)  # like many published models
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    loaded = backbones.load_language_model(Backbone(language_model=str(tmp_path)))
    assert (started_by(loaded), loaded.eos_id) == (1, 2)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    ids_BT = loaded.tokenizer(["a red circle", "blue square left"], add_special_tokens=False, return_tensors="pt")
    assert ids_BT["input_ids"].tolist() == [[3, 4, 6], [5, 7, 9]]
    with torch.no_grad():
        found_BTV, expected_BTV = (m(ids_BT["input_ids"]).logits for m in (loaded.model, model.float()))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_offline")
def test_a_language_model_without_bos_begins_with_its_end_of_text_token(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="</s>")
    assert started_by(backbones.load_language_model(Backbone(language_model=str(tmp_path)))) == 2


@pytest.mark.parametrize("place", ["config", "generation_config"])
@pytest.mark.usefixtures("_offline")
def test_a_tokenizer_without_eos_takes_that_of_the_model(tmp_path: Path, place: str) -> None:
    """Qwen-1 is published like this; of several end-of-text tokens the first is taken (Llama 3 has two)."""
    model = llama()
    model.config.eos_token_id, model.config.bos_token_id = None, 1
    model.generation_config.eos_token_id = None
    getattr(model, place).eos_token_id = [2, 1]
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded = backbones.load_language_model(Backbone(language_model=str(tmp_path)))
    assert (loaded.eos_id, started_by(loaded)) == (2, 1)
    assert loaded.tokenizer.decode([3, 4, 2], skip_special_tokens=True) == "a red"


@pytest.mark.usefixtures("_offline")
def test_a_model_without_eos_is_refused_before_compute(tmp_path: Path) -> None:
    model = llama()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, bos_token="<s>")
    with pytest.raises(UserError, match=r"backbone\.language_model: .*names an eos token.*tokenizer_config\.json"):
        backbones.load_tokenizer(Backbone(language_model=str(tmp_path)))


@pytest.mark.parametrize(("make", "limit"), [(tiny_gpt2, 64), (tiny_opt, 64), (tiny_llama, None), (tiny_neox, None)])
def test_learned_positions_end_and_rotary_ones_do_not(make: Callable[[], Any], limit: int | None) -> None:
    model = make()
    assert backbones.max_positions(model) == limit
    if limit is not None:  # the last position works, the next one is an index error
        model(torch.zeros(1, limit, dtype=torch.long))
        with pytest.raises(IndexError, match="index out of range"):
            model(torch.zeros(1, limit + 1, dtype=torch.long))


def test_the_built_in_language_model_reads_any_text() -> None:
    language_model = backbones.load_language_model(Backbone())
    text = "two züge, 漢字 and a 🦊"
    ids = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert language_model.tokenizer.decode(ids) == text
    assert started_by(language_model) != language_model.eos_id


# ── Without weights, without a network


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("facebook/opt-125m", 125_239_296), ("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("builtin/tiny-llama", None)],
)
@pytest.mark.usefixtures("_offline")
def test_known_language_models_are_counted_offline(name: str, parameters: int | None) -> None:
    if parameters is None:
        live = backbones.load_language_model(Backbone(language_model=name)).model
        parameters = sum(p.numel() for p in live.parameters())
    model = backbones.build_empty(Backbone(language_model=name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.usefixtures("_offline")
def test_an_unknown_hub_id_offline_is_an_error() -> None:
    name = "facebook/opt-125mm"
    with pytest.raises(
        UserError,
        match=r"'facebook/opt-125mm'.*from a folder or from the hub.*offline mode.*builtin/tiny-llama",
    ):
        backbones.check_backbone(Backbone(language_model=name))
    with pytest.raises(UserError, match=r"'facebook/opt-125mm' could not be loaded from a folder or from the hub"):
        backbones.load_language_model(Backbone(language_model=name))


@pytest.mark.usefixtures("_offline")
def test_a_hub_id_that_is_known_but_not_in_the_cache_fails_before_any_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its configuration is known, so it can be counted; its weights could not be loaded, so it cannot be run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.load_config("facebook/opt-125m")
    with pytest.raises(UserError, match="'facebook/opt-125m' could not be loaded"):
        backbones.check_backbone(Backbone(language_model="facebook/opt-125m"))


@pytest.mark.usefixtures("_offline")
def test_a_missing_folder_and_an_unknown_built_in_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/nowhere': no such folder; .*builtin/tiny-llama"):
        backbones.check_backbone(Backbone(language_model=f"{tmp_path}/nowhere"))
    with pytest.raises(
        UserError, match=r"'builtin/tiny-lama' is not a built-in language model; .*did you mean 'builtin/tiny-llama'"
    ):
        backbones.check_backbone(Backbone(language_model="builtin/tiny-lama"))


@pytest.mark.usefixtures("_offline")
def test_a_folder_of_models_is_an_error_that_names_them(tmp_path: Path) -> None:
    for precision in ("bf16", "fp32"):
        (tmp_path / precision).mkdir()
        (tmp_path / precision / "config.json").write_text("{}", encoding="utf-8")
    allowed = f"allowed: {tmp_path}/bf16, {tmp_path}/fp32; did you mean"
    with pytest.raises(UserError, match=rf"'{tmp_path}' has no config.json, but folders in it have: {allowed}"):
        backbones.check_backbone(Backbone(language_model=str(tmp_path)))


@pytest.mark.usefixtures("_offline")
def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"'{tmp_path}' could not be loaded"):
        backbones.load_language_model(Backbone(language_model=str(tmp_path)))
