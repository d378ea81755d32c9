"""The loss from logits in chunks, against that from all of them, and what is in memory meanwhile.

Shapes: N target tokens, V vocabulary, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from harness.experiment.sections import Resources
from harness.model import target_logits
from harness.model.batch import Targets
from harness.model.build import build
from harness.model.target_logits import nll_in_chunks, nll_of, wants_chunks
from harness.price.rows import rows_of
from harness.price.trace import trace
from harness.trial.measure import saved_for_backward
from tests.support.families import OPTIONS, tiny
from tests.support.trials import FULL, LORA, spec_of

TARGETS = Targets.of([[(row, 3 + n, 5 + n) for n in range(6)] for row in range(3)])
SMALL = 4 * 64 * 5  # five tokens of 64


def inputs(model: Any, length: int = 10) -> Tensor:
    width, dtype = model.get_input_embeddings().embedding_dim, model.dtype
    return torch.randn(3, length, width, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def whole(model: Any, x_BTD: Tensor, targets: Targets = TARGETS) -> Tensor:
    logits_NV = model(inputs_embeds=x_BTD, use_cache=False).logits[targets.row_N, targets.source_N]
    return nll_of(logits_NV, targets.label_N)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_logits, "CHUNK_BYTES", SMALL)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_all_logits(
    tied: bool, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **OPTIONS["llama"], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    head = model.get_output_embeddings()
    if bias:
        head.bias = torch.nn.Parameter(torch.randn(64, dtype=dtype))
    x_BTD = inputs(model)
    trained = [x_BTD, head.weight, *([head.bias] if bias else [])]
    expected_N = whole(model, x_BTD)
    assert wants_chunks(model, TARGETS)
    found_N = nll_in_chunks(model, x_BTD, TARGETS)
    assert found_N is not None
    assert found_N.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found_N, expected_N, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(found_N.sum(), trained)
    for grad, expected in zip(grads, torch.autograd.grad(expected_N.sum(), trained), strict=True):
        assert (grad - expected).norm() <= tolerance * expected.norm()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", OPTIONS)
def test_a_family_that_changes_its_logits_computes_them_itself(family: str) -> None:
    model = tiny(family, torch.float64)
    x_BTD = inputs(model)
    caps = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if not wants_chunks(model, TARGETS):
        pytest.fail("the output layer of a known family is a plain one")
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            found_N = nll_in_chunks(model, x_BTD, TARGETS)
            assert (found_N is None) is bool(caps)
            if found_N is not None:
                torch.testing.assert_close(found_N, whole(model, x_BTD), rtol=1e-9, atol=1e-9)
    assert not model.get_output_embeddings()._forward_hooks


def test_an_output_layer_with_hooks_of_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    assert not wants_chunks(model, TARGETS)  # few logits
    monkeypatch.setattr(target_logits, "CHUNK_BYTES", SMALL)
    assert wants_chunks(model, TARGETS)
    handle = model.get_output_embeddings().register_forward_hook(lambda _m, _a, y: 2 * y)
    assert not wants_chunks(model, TARGETS)
    handle.remove()
    model.get_output_embeddings().weight.ds_id = 0  # as ZeRO-3 marks it
    assert not wants_chunks(model, TARGETS)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def test_with_a_vocabulary_of_50_000_no_tensor_is_larger_than_a_chunk() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{**OPTIONS["llama"], "vocab_size": 50_000, "num_hidden_layers": 1})
    ).requires_grad_(False)
    targets = Targets.of([[(row, n, n) for n in range(250)] for row in range(3)])
    x_BTD = inputs(model, 250)
    all_logits = 750 * 50_000 * 4
    with saved_for_backward(model) as saved, Largest() as largest:
        found_N = nll_in_chunks(model, x_BTD, targets)
        assert found_N is not None
        found_N.sum().backward()
    assert largest.bytes <= target_logits.CHUNK_BYTES < all_logits / 2
    assert saved[0] < all_logits / 20
    with saved_for_backward(model) as saved:
        whole(model, x_BTD, targets).sum().backward()
    assert saved[0] > all_logits


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_a_models_loss_is_the_same_with_and_without_chunks(tmp_path: Path, adapter: dict[str, Any]) -> None:
    built = build(spec_of(tmp_path, adapter), torch.device("cpu"))
    built.model.train()
    batch = built.batches.train(built.splits.train, built.order.epoch(1)[:6], share=False)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for chunked in (True, False):
        built.model.chunked_loss = chunked
        built.model.zero_grad()
        torch.manual_seed(0)
        loss = built.model(batch)[0].sum()
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}))
        assert built.model.chunked_loss is chunked
    (loss, grads), (expected, expected_grads) = found
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.usefixtures("small_chunks")
def test_a_model_that_scales_its_logits_draws_its_dropout_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(spec_of(tmp_path, LORA | {"dropout": 0.5}), torch.device("cpu"))
    built.model.train()
    plain = built.model.language_model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(built.model.language_model, "forward", forward)
    batch = built.batches.train(built.splits.train, built.order.epoch(1)[:6], share=False)
    losses = []
    for chunked in (True, False):
        built.model.chunked_loss = chunked
        torch.manual_seed(0)
        losses.append(built.model(batch)[0].sum().item())
        assert built.model.chunked_loss is False
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.slow
def test_a_traced_step_saves_what_a_step_in_chunks_saves(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, FULL)
    built = build(spec, torch.device("cpu"))
    batch = rows_of(spec, built.splits.train).first
    (chunked,), (alone,) = (trace(spec, batch, Resources(chunked_loss=on)) for on in (True, False))
    built.model.train()
    with saved_for_backward(built.model) as saved:
        nll_R, tokens_R = built.model(batch)
        loss = nll_R.sum() / tokens_R.sum()
    assert loss.isfinite()
    assert chunked.activations_bytes == saved[0] < alone.activations_bytes
