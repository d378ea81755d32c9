"""Adapted models as objects: copies, pickles, functional calls, and models that change after adapting."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import harness
from adapters.attach import Adapters
from adapters.base import AdapterMethod, ModelChange
from adapters.placement.router import Router
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, ROWS_BT, SPECS, adapted_model, logits, traces
from tests.support.adapters import disturb, embeds
from tests.support.models import tiny_llama
from tests.support.tiers import some_fast

PEFT = {"method": "peft", "config": {"peft_type": "LORA", "r": 3, "lora_dropout": 0.5}}
SHARED = ("lora", "pissa", "dora", "vera", "bitfit", "ia3", "ln_tuning", "moka", "soft_prompt")
CASES: dict[str, tuple[dict[str, Any], str]] = {
    **{name: (SPECS[name], "specific") for name in SHARED},
    "bottleneck": ({**SPECS["bottleneck"], "non_linearity": "gelu"}, "specific"),
    "combination": ({"method": "lora+bitfit", "rank": 3}, "specific"),
    "mmca": ({"method": "mmca"}, "agnostic"),
    "peft": (PEFT, "agnostic"),
    "full": ({"method": "full"}, "agnostic"),
}
each_case = pytest.mark.parametrize(("spec", "grouping"), CASES.values(), ids=CASES)


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


# torch.save pickles too, all but the tensors: fast tests are one method of each kind of state.
@some_fast(
    "case",
    {f"{name}-{how}": (*case, make_copy) for name, case in CASES.items() for how, make_copy in COPIES.items()},
    slow=[f"{name}-torch.save" for name in CASES if name not in ("lora", "vera", "soft_prompt", "peft", "full")],
)
def test_a_copy_is_a_model_of_its_own(case: Any) -> None:
    spec, grouping, make_copy = case
    model = tiny_llama()
    base_BTV = model(inputs_embeds=embeds()).logits
    traces_before = traces(model)
    adapted = adapted_model(model, spec, grouping)
    expected_BTV = logits(adapted, embeds(), ROWS_BT)

    twin = make_copy(adapted)
    assert torch.equal(logits(twin, embeds(), ROWS_BT), expected_BTV)
    disturb(twin.parameters(), seed=9) if spec["method"] != "mmca" else None
    assert torch.equal(logits(adapted, embeds(), ROWS_BT), expected_BTV)

    bare = make_copy(adapted).detach()
    assert torch.equal(logits(adapted, embeds(), ROWS_BT), expected_BTV)
    of_base = make_copy(model)  # the base alone takes its adapters with it
    with pytest.raises(UserError, match="no layout was set") if _reads(spec) else _nothing():
        of_base(inputs_embeds=embeds())
    found = harness.detach(of_base)
    assert found is of_base
    if spec["method"] != "full":
        assert torch.equal(bare(inputs_embeds=embeds()).logits, base_BTV)
        assert torch.equal(found(inputs_embeds=embeds()).logits, base_BTV)
    assert sorted(vars(found)) == sorted(vars(bare))
    assert torch.equal(logits(adapted, embeds(), ROWS_BT), expected_BTV)
    again = adapted_model(found, spec, grouping)
    assert torch.equal(logits(again, embeds(), ROWS_BT), expected_BTV) or spec["method"] == "full"
    assert adapted.detach() is model
    assert traces(model) == traces_before


def _reads(spec: Any) -> bool:
    return spec["method"] not in ("peft", "full")


def _nothing() -> Any:
    return nullcontext()


def test_a_copy_trains_alone() -> None:
    adapted = adapted_model(tiny_llama())
    twin = copy.deepcopy(adapted)
    twin(inputs_embeds=embeds(), context_ids=ROWS_BT).logits.sum().backward()
    assert all(p.grad is None for p in adapted.parameters())
    assert all(p.grad is not None for p in twin.adapters.parameters())


class Closing(AdapterMethod):
    """A method of another author, whose undo is a closure."""

    summary = "closes"

    def label(self) -> str:
        return "closing"

    def model_change(self, language_model: Any, *args: Any) -> ModelChange:
        class Change(ModelChange):
            def attach(self, language_model: nn.Module) -> Any:
                handle = language_model.register_forward_pre_hook(_pass)
                return lambda: handle.remove()  # noqa: PLW0108 - a closure

        return Change()


def _pass(_module: Any, _args: Any) -> None:
    return None


def test_a_model_whose_copy_would_restore_the_original_is_not_copied() -> None:
    model = tiny_llama()
    router = Router({"text": "all"})
    adapters = Adapters(model, {"all": Closing(None)}, router, seed=0)
    adapters.attach(model)
    with pytest.raises(UserError, match=r"cannot be copied or pickled: .*attach.*is a closure; .*functools\.partial"):
        copy.deepcopy((model, adapters))
    adapters.detach()
    assert not model._forward_pre_hooks


# ── torch.func


@each_case
def test_functional_calls_use_the_given_parameters(spec: Any, grouping: str) -> None:
    adapted, other = adapted_model(tiny_llama(), spec, grouping), adapted_model(tiny_llama(), spec, grouping)
    disturb((p for p in other.parameters() if p.requires_grad), seed=9)
    inputs = {"inputs_embeds": embeds(), "context_ids": ROWS_BT}
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        found_BTV = torch.func.functional_call(adapted, given, kwargs=inputs).logits
    if spec["method"] != "peft":  # PEFT's layers keep twins of the base's layers, with the base's own weights
        assert torch.equal(found_BTV, logits(other, embeds(), ROWS_BT))


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mmca", "full")])
def test_functional_gradients_equal_autograds(name: str) -> None:
    spec, grouping = CASES[name]
    adapted = adapted_model(tiny_llama(), spec, grouping)
    own = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for ids in (IDS_T, ROWS_BT):

        def loss(parameters: dict[str, Tensor], ids: Tensor = ids) -> Tensor:
            inputs = {"inputs_embeds": embeds(), "context_ids": ids, "use_cache": False}
            found: Any = torch.func.functional_call(adapted, parameters, kwargs=inputs)
            return found.logits.square().mean()  # type: ignore[no-any-return]

        expected = torch.autograd.grad(loss(own), list(own.values()), allow_unused=True)
        found = torch.func.grad(loss)({name: p.detach() for name, p in own.items()})
        for (path, grad), expected_grad in zip(found.items(), expected, strict=True):
            wanted = torch.zeros_like(grad) if expected_grad is None else expected_grad
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6, msg=lambda m, n=path: f"{n}: {m}")


# ── A lost handle, and models that change


def test_adapters_are_removed_without_their_handle() -> None:
    model = tiny_llama()
    before, base_BTV = traces(model), model(inputs_embeds=embeds()).logits
    harness.adapt(model, LORA)
    assert harness.detach(model) is model
    assert traces(model) == before
    assert torch.equal(model(inputs_embeds=embeds()).logits, base_BTV)
    assert harness.detach(model) is model  # a model without adapters is left alone
    adapted = harness.adapt(model, LORA)
    assert harness.detach(adapted) is model
    with pytest.raises(UserError, match="was detached"):
        logits(adapted, embeds(), IDS_T)
    with pytest.raises(UserError, match="model: found dict; allowed: a Hugging Face causal language model"):
        harness.detach({})


@pytest.mark.parametrize("method", ["full", "lora"])
def test_resized_embeddings_are_saved_and_freed_by_name(method: str, tmp_path: Path) -> None:
    model = tiny_llama().requires_grad_(True)
    adapted = harness.adapt(model, {"method": method})
    model.resize_token_embeddings(80)
    assert model.lm_head.weight.requires_grad == (method == "full")
    with torch.no_grad():
        model.lm_head.weight.fill_(7.0)
    adapted.save(tmp_path)
    tensors = load_file(tmp_path / "context_peft.safetensors")
    if method == "full":
        assert torch.equal(tensors["base.lm_head.weight"], torch.full((80, 32), 7.0))
    else:
        assert not [name for name in tensors if name.startswith("base.")]
    adapted.detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("trainable", [True, False])
def test_a_merged_bias_is_as_free_as_its_layer(trainable: bool) -> None:
    model = tiny_llama().requires_grad_(trainable)
    merged = adapted_model(model, {"method": "bitfit"}, "agnostic").merge()
    biases = {name: p for name, p in merged.named_parameters() if name.endswith(".bias")}
    assert biases
    assert all(p.requires_grad == trainable for p in merged.parameters())
