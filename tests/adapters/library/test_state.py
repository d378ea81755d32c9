"""``state_dict`` of an adapted model holds what differs from the base, and loads strictly."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.adapted import ROWS_BT, SPECS, adapted_model, logits
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_llama

CASES: dict[str, tuple[dict[str, Any], str]] = {
    **{name: (SPECS[name], "specific") for name in ("lora", "vera", "soft_prompt")},
    "peft": ({"method": "peft", "config": {"peft_type": "LORA", "r": 3}}, "agnostic"),
    "full": ({"method": "full"}, "agnostic"),
}
each_case = pytest.mark.parametrize(("spec", "grouping"), CASES.values(), ids=CASES)


def tied() -> Any:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@each_case
def test_it_holds_what_differs_from_the_base_and_each_tensor_once(spec: Any, grouping: str) -> None:
    adapted = adapted_model(tied(), spec, grouping)
    found = adapted.state_dict()
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained <= found.keys()
    assert all(name.startswith("adapters.") for name in found.keys() - trained)
    pointers = [tensor.data_ptr() for tensor in found.values()]
    assert len(set(pointers)) == len(pointers)
    assert ("base_model.lm_head.weight" in found) is False  # tied: the other name
    assert ("base_model.model.embed_tokens.weight" in found) is (spec["method"] == "full")


@each_case
def test_an_equally_adapted_model_loads_it_strictly(spec: Any, grouping: str) -> None:
    adapted = adapted_model(tied(), spec, grouping)
    if spec["method"] == "full":
        disturb(p for p in adapted.parameters() if p.requires_grad)
    expected_BTV = logits(adapted, embeds(), ROWS_BT)
    other = adapted_model(tied(), spec, grouping)
    disturb((p for p in other.parameters() if p.requires_grad), seed=9)
    assert not torch.equal(logits(other, embeds(), ROWS_BT), expected_BTV)
    assert str(other.load_state_dict(adapted.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(logits(other, embeds(), ROWS_BT), expected_BTV)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_copies_and_models_inside_others_do_the_same(make_copy: Any) -> None:
    pair = nn.ModuleDict({"student": adapted_model(tied()), "teacher": adapted_model(tied(), *CASES["full"])})
    kept = pair.state_dict()
    assert not [name for name in kept if name.startswith("student.base_model")]
    assert "teacher.base_model.model.norm.weight" in kept
    twin = make_copy(pair)
    assert twin.state_dict().keys() == kept.keys()
    assert str(twin.load_state_dict(kept)) == "<All keys matched successfully>"
    del kept["teacher.base_model.model.norm.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "teacher.base_model.model.norm.weight"'):
        twin.load_state_dict(kept)


def test_what_is_missing_or_foreign_is_named() -> None:
    adapted = adapted_model(tied())
    kept = adapted.state_dict()
    gone = next(iter(kept))
    whole = {**kept, **{f"base_model.{name}": tensor for name, tensor in adapted.base_model.state_dict().items()}}
    adapted.load_state_dict(whole)  # of an earlier version: with the base
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict({name: tensor for name, tensor in kept.items() if name != gone})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        adapted.load_state_dict({**kept, "adapters.other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict({})


def test_the_base_alone_has_its_complete_state() -> None:
    model = tied()
    names = set(model.state_dict())
    adapted = adapted_model(model)
    assert set(adapted.base_model.state_dict()) == names
    model.lm_head.weight.requires_grad_(True)  # trained besides the adapters: kept too
    assert "base_model.model.embed_tokens.weight" in adapted.state_dict()


# ── What training loops ask


def test_it_answers_as_its_base() -> None:
    model = tiny_llama()
    adapted = adapted_model(model)
    assert adapted.config is model.config
    assert adapted.generation_config is model.generation_config
    assert adapted.get_input_embeddings() is model.get_input_embeddings()
    assert adapted.device == model.device
    assert adapted.loss_type == "ForCausalLM"
    assert adapted.accepts_loss_kwargs
    assert adapted._get_name() == "LlamaForCausalLM"
    assert repr(adapted).startswith("AdaptedModel(\n")
    for absent in ("save_pretrained", "hf_device_map", "nonsense"):
        assert not hasattr(adapted, absent)
    model.forward = lambda input_ids=None: None
    assert not adapted.accepts_loss_kwargs
