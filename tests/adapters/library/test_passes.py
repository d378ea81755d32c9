"""A layout belongs to a pass: to its recomputation in backward, to its thread, and to nothing after it."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import harness
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, LORA, ROWS_BT, adapted_model, logits
from tests.support.adapters import embeds
from tests.support.models import each_model, tiny_gpt2, tiny_llama, tiny_opt
from tests.support.passes import OTHER_BT, PADDED_BT, assert_close, each_method, gradients, loss


@pytest.mark.parametrize("reentrant", [True, False])
@each_method
def test_two_passes_before_one_backward(spec: Any, reentrant: bool) -> None:
    """A preference loss: another layout, another mask, and an evaluation pass of a third layout before backward."""

    def found(checkpointing: bool) -> dict[str, Tensor]:
        model = tiny_llama()
        adapted = adapted_model(model, spec).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})

        def both() -> Tensor:
            chosen, rejected = loss(adapted, ROWS_BT), loss(adapted, OTHER_BT, PADDED_BT)
            adapted.eval()
            logits(adapted, embeds(), IDS_T)
            adapted.train()
            return chosen - rejected

        return gradients(adapted, both)

    assert_close(found(True), found(False))


@pytest.mark.parametrize("make_model", [tiny_opt, tiny_gpt2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_of_other_families(make_model: Any, reentrant: bool) -> None:
    def found(checkpointing: bool) -> dict[str, Tensor]:
        model = make_model()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})  # before the adapters
        adapted = adapted_model(model).train()
        return gradients(adapted, lambda: loss(adapted, ROWS_BT) - loss(adapted, IDS_T))

    assert_close(found(True), found(False))


def test_backward_inside_another_pass_and_in_another_thread() -> None:
    adapted = adapted_model(tiny_llama()).train()
    expected = gradients(adapted, lambda: loss(adapted, ROWS_BT))
    expected = {name: grad.clone() for name, grad in expected.items()}
    adapted.base_model.activation_checkpointing_enable({"use_reentrant": False})

    def inside() -> None:
        adapted.zero_grad()
        kept = loss(adapted, ROWS_BT)
        handle = adapted.base_model.model.norm.register_forward_pre_hook(lambda *_: kept.backward())
        with torch.no_grad():
            adapted(inputs_embeds=embeds(), context_ids=IDS_T, use_cache=False)
        handle.remove()
        assert_close({n: p.grad for n, p in adapted.adapters.named_parameters() if p.grad is not None}, expected)

    inside()
    adapted.zero_grad()
    kept = loss(adapted, ROWS_BT)
    thread = threading.Thread(target=kept.backward)
    thread.start()
    thread.join()
    assert_close({n: p.grad for n, p in adapted.adapters.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_whole_adapted_model_is_checkpointed(reentrant: bool) -> None:
    def found(checkpointing: bool) -> dict[str, Tensor]:
        adapted = adapted_model(tiny_llama())

        def one(ids: Tensor) -> Tensor:
            x_BTD = embeds().requires_grad_()

            def run(x: Tensor) -> Tensor:
                found_BTV: Tensor = adapted(inputs_embeds=x, context_ids=ids, use_cache=False).logits
                return found_BTV

            out_BTV: Any = checkpoint(run, x_BTD, use_reentrant=reentrant) if checkpointing else run(x_BTD)
            return out_BTV.square().mean()  # type: ignore[no-any-return]

        return gradients(adapted, lambda: one(ROWS_BT) - one(IDS_T))

    assert_close(found(True), found(False))


def test_checkpointing_is_the_models_own_again_after_detaching() -> None:
    adapted = adapted_model(tiny_llama()).train()
    model = adapted.base_model
    model.activation_checkpointing_enable({"use_reentrant": False})
    before = [layer._gradient_checkpointing_func for layer in model.model.layers]
    loss(adapted, ROWS_BT)
    adapted.detach()
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == before
    assert not model._forward_pre_hooks


@each_method
def test_the_bare_base_is_an_error_not_the_last_layout(spec: Any) -> None:
    adapted = adapted_model(tiny_llama(), spec)
    ids_BT = torch.randint(64, (1, 11))
    logits(adapted, embeds(), IDS_T)
    adapted.generate(input_ids=ids_BT, context_ids=IDS_T, new_token_context="text", max_new_tokens=2, eos_token_id=None)
    for call in (adapted.base_model, adapted.base_model.model):
        with pytest.raises(UserError, match=r"called directly while it has adapters.*harness\.detach"):
            call(inputs_embeds=embeds(), use_cache=False)


def test_a_pass_that_fails_leaves_nothing() -> None:
    adapted = adapted_model(tiny_llama())
    handle = adapted.base_model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        logits(adapted, embeds(), IDS_T)
    handle.remove()
    with pytest.raises(UserError, match="no layout was set"):
        adapted.base_model(inputs_embeds=embeds(), use_cache=False)


def test_a_pass_inside_a_pass() -> None:
    """A reference model, or a look at another layout, in the middle of a pass."""
    adapted = adapted_model(tiny_llama())
    expected_BTV, other_BTV = logits(adapted, embeds(), ROWS_BT), logits(adapted, embeds(), IDS_T)
    inner: list[Tensor] = []

    def look(*_: Any) -> None:
        handle.remove()
        inner.append(logits(adapted, embeds(), IDS_T))

    handle = adapted.base_model.model.layers[1].register_forward_pre_hook(look)
    assert torch.equal(logits(adapted, embeds(), ROWS_BT), expected_BTV)
    assert torch.equal(inner[0], other_BTV)


@each_method
def test_each_thread_has_its_own_layout(spec: Any) -> None:
    adapted = adapted_model(tiny_llama(), spec)
    layouts = [(ROWS_BT, None), (OTHER_BT, PADDED_BT)]
    expected = [logits(adapted, embeds(), ids, attention_mask=mask) for ids, mask in layouts]
    wrong: list[int] = []

    def work(which: int) -> None:
        ids, mask = layouts[which]
        for _ in range(15):
            if not torch.equal(logits(adapted, embeds(), ids, attention_mask=mask), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    with pytest.raises(UserError, match="no layout was set"):
        adapted.base_model(inputs_embeds=embeds(), use_cache=False)


class Reads(TorchDispatchMode):
    """Counts operators whose result the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "equal"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def reads(run: Callable[[], Any]) -> Counter[str]:
    with Reads() as mode:
        run()
    return mode.found


@each_model
@each_method
def test_no_layer_and_no_new_token_waits_for_the_device(spec: Any, make_model: Any) -> None:
    """Neither in forward and backward, nor in generation: not more than the base itself."""
    model, ids_BT = make_model(), torch.randint(64, (3, 11))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask_BT = torch.ones(3, 11, dtype=torch.long)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
    x_BTD = embeds()
    of_base = reads(lambda: model(inputs_embeds=x_BTD, attention_mask=mask_BT, use_cache=False))
    written_by_base = reads(lambda: model.generate(**inputs, **options))

    adapted = adapted_model(model, spec)
    for ids in (IDS_T, ROWS_BT):
        assert reads(lambda ids=ids: adapted(inputs_embeds=x_BTD, context_ids=ids, use_cache=False)) <= of_base
        found = reads(lambda ids=ids: loss(adapted, ids, mask_BT).backward())  # type: ignore[no-untyped-call]
        assert found <= of_base
        prompt = {"context_ids": ids, "new_token_context": "text"}
        found = reads(lambda prompt=prompt: adapted.generate(**inputs, **prompt, **options))
        found.subtract(written_by_base)
        assert sum(found.values()) <= 1, found  # padding on the right is looked for once


def test_context_ids_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapted_model(tiny_llama())
    read: list[tuple[int, ...]] = []
    plain = Tensor.numpy
    monkeypatch.setattr(Tensor, "numpy", lambda self: read.append(tuple(self.shape)) or plain(self))
    logits(adapted, embeds(), ROWS_BT)
    assert read == [tuple(ROWS_BT.shape)]
    adapted.generate(
        inputs_embeds=embeds(), context_ids=ROWS_BT, new_token_context="text", max_new_tokens=4, eos_token_id=None
    )
    assert read == [tuple(ROWS_BT.shape)] * 2  # of the prompt; new tokens are known


def test_a_copied_cache_goes_on() -> None:
    """A prompt that is read once and continued several times."""
    adapted = adapted_model(tiny_llama())
    expected_BTV = logits(adapted, embeds(), ROWS_BT)
    with torch.no_grad():
        cache = adapted(inputs_embeds=embeds()[:, :6], context_ids=ROWS_BT[:, :6], use_cache=True).past_key_values
    for _ in range(2):
        again_BTV = logits(adapted, embeds()[:, 6:], ROWS_BT[:, 6:], past_key_values=copy.deepcopy(cache))
        torch.testing.assert_close(again_BTV, expected_BTV[:, 6:], rtol=1e-5, atol=1e-5)
    other = harness.adapt(tiny_llama(), LORA, grouping="specific")
    with pytest.raises(UserError, match="past_key_values: found 6 positions"):
        logits(other, embeds()[:, 6:], ROWS_BT[:, 6:], past_key_values=cache)


@torch.no_grad()
def test_rows_of_a_cache_that_a_caller_exchanges_are_refused_where_their_contexts_matter() -> None:
    """A beam search of the caller's own: mmca would take the cached tokens' contexts for those of other rows."""
    order = torch.tensor([1, 0, 2])
    for spec, refused in ((LORA, False), ({"method": "mmca+lora"}, True)):
        adapted = adapted_model(tiny_llama(), spec)
        x_BTD, ids_BT = embeds()[:3], ROWS_BT[:3].clone()
        ids_BT[:, :6] = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 0, 1]])[: len(x_BTD)]
        expected_BTV = logits(adapted, x_BTD, ids_BT)
        cache = adapted(inputs_embeds=x_BTD[:, :6], context_ids=ids_BT[:, :6], use_cache=True).past_key_values
        cache.crop(-1)
        again_BTV = logits(adapted, x_BTD[:, 5:6], ids_BT[:, 5:6], past_key_values=cache)
        torch.testing.assert_close(again_BTV, expected_BTV[:, 5:6], rtol=1e-5, atol=1e-5)
        rows = order[: len(x_BTD)]
        cache.reorder_cache(rows)
        if refused:
            with pytest.raises(UserError, match="past_key_values: its rows were exchanged"):
                logits(adapted, x_BTD[rows, 6:], ids_BT[rows, 6:], past_key_values=cache)
        else:
            rest_BTV = logits(adapted, x_BTD[rows, 6:], ids_BT[rows, 6:], past_key_values=cache)
            torch.testing.assert_close(rest_BTV, expected_BTV[rows, 6:], rtol=1e-5, atol=1e-5)
