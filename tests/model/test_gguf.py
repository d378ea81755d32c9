"""Language models of GGUF files: the numbers of their blocks, their tokenizer, and what a folder must hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from harness.core import hub
from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model.backbones import TINY_LLAMA, build_empty, check_backbone, load_language_model
from harness.model.packed import count
from tests.support.gguf_files import read_gguf, write_gguf

pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
TINY = Path(hub.resolve(TINY_LLAMA))


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    write_gguf(LlamaForCausalLM.from_pretrained(TINY), TINY, folder / "tiny.gguf", request.param)
    return folder


def of(folder: Path, **options: Any) -> Backbone:
    return Backbone(language_model=str(folder), quantization="gguf", **options)


def test_logits_are_those_of_the_files_numbers(folder: Path) -> None:
    """In float64, from the blocks as the gguf library reads them."""
    check_backbone(of(folder))
    found = load_language_model(of(folder))
    reference = LlamaForCausalLM.from_pretrained(TINY).double()
    heads = reference.config.num_attention_heads
    weights = read_gguf(folder / "tiny.gguf", heads, heads, reference.config.num_hidden_layers)
    reference.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, strict=False)
    for name, p in found.model.named_parameters():
        torch.testing.assert_close(p.double(), torch.from_numpy(weights[name]).double(), rtol=1e-6, atol=1e-7)
    ids_BT = torch.tensor([found.tokenizer("A red circle.").input_ids])
    with torch.no_grad():
        found_BTV, expected_BTV = found.model(ids_BT).logits, reference(ids_BT).logits
    torch.testing.assert_close(found_BTV.double(), expected_BTV, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_is_the_files(folder: Path) -> None:
    mine, its = load_language_model(of(folder)).tokenizer, AutoTokenizer.from_pretrained(TINY)
    text = "A red circle, left of <b> 3+4."
    assert mine(text).input_ids == its(text).input_ids
    assert (mine.bos_token_id, mine.eos_token_id, mine.pad_token_id) == (0, 1, 2)


def test_its_weights_are_counted_without_values_and_take_the_dtype_asked_for(folder: Path) -> None:
    empty = build_empty(of(folder, dtype="bf16"))
    loaded = load_language_model(of(folder, dtype="bf16")).model
    assert count(empty) == count(loaded) == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(TINY).parameters())
    assert {p.dtype for p in empty.parameters()} == {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_folder_must_hold_one_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"language_model: .*found no .gguf file; allowed: a folder or hub id with one"):
        check_backbone(of(tmp_path))
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        shutil.copy(folder / "tiny.gguf", tmp_path / name)
    with pytest.raises(UserError, match=r"found 2 .gguf files: a-Q4_0.gguf, a-Q8_0.gguf; allowed: a folder with the"):
        check_backbone(of(tmp_path))


def test_a_folder_of_such_a_file_without_the_key_says_so(folder: Path) -> None:
    with pytest.raises(UserError, match=r"tiny.gguf.*backbone.quantization: gguf"):
        check_backbone(Backbone(language_model=str(folder)))
