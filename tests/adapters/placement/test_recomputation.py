"""Layers inside any activation checkpointing are recomputed with the layout of their own pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from adapters.placement.recomputation import recompute_within
from harness.core.errors import UserError
from tests.support.adapted import IDS_T, ROWS_BT, SPECS, adapted_model
from tests.support.models import tiny_llama, tiny_opt
from tests.support.passes import METHODS, OTHER_BT, PADDED_BT, assert_close, gradients, loss


def _saving(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu():
        return run(*args, **kwargs)


FORMS: dict[str, Callable[..., Any]] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "within saving on the CPU": lambda run, x: _saving(checkpoint, run, x, use_reentrant=False),
    "saving on the CPU within": lambda run, x: checkpoint(partial(_saving, run), x, use_reentrant=False),
    "nested": lambda run, x: checkpoint(partial(checkpoint, run, use_reentrant=False), x, use_reentrant=False),
    "nested, reentrant outside": lambda run, x: checkpoint(
        partial(checkpoint, run, use_reentrant=False), x, use_reentrant=True
    ),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def wrap(layer: Any, form: Callable[..., Any]) -> None:
    plain = layer.forward
    layer.forward = lambda x: form(plain, x)


def of_mlps(model: Any, form: Callable[..., Any]) -> None:
    """The feed-forward blocks, each in a checkpoint of its own."""
    for block in model.model.layers:
        wrap(block.mlp, form)


def two_passes(adapted: Any) -> Tensor:
    return loss(adapted, ROWS_BT) - loss(adapted, OTHER_BT, PADDED_BT)


@each_form
def test_two_passes_before_one_backward(form: Any) -> None:
    expected = gradients(plain := adapted_model(tiny_llama()).train(), lambda: two_passes(plain))
    adapted = adapted_model(tiny_llama()).train()
    of_mlps(adapted.base_model, form)
    assert_close(gradients(adapted, lambda: two_passes(adapted)), expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lora"])
@pytest.mark.parametrize("form", [FORMS["reentrant"], FORMS["not reentrant"]], ids=["reentrant", "not reentrant"])
def test_every_method(name: str, form: Any) -> None:
    expected = gradients(plain := adapted_model(tiny_llama(), SPECS[name]).train(), lambda: two_passes(plain))
    adapted = adapted_model(tiny_llama(), SPECS[name]).train()
    of_mlps(adapted.base_model, form)
    assert_close(gradients(adapted, lambda: two_passes(adapted)), expected)


@pytest.mark.parametrize("implementation", CheckpointImpl)
@pytest.mark.parametrize("first", [True, False])
def test_blocks_in_fsdps_checkpoint_wrapper(implementation: CheckpointImpl, first: bool) -> None:
    """Wrapped before or after adapting: whole blocks, whose other arguments are keywords."""
    expected = gradients(plain := adapted_model(tiny_llama()).train(), lambda: two_passes(plain))

    def put(model: Any) -> None:
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=implementation),
            check_fn=lambda module: module in blocks,
        )

    model = tiny_llama()
    blocks = list(model.model.layers)
    roles = {
        f"model.layers.*.{'_checkpoint_wrapped_module.' if first else ''}{path}": role
        for path, role in (
            *((f"self_attn.{role}_proj", role) for role in "qkvo"),
            *((f"mlp.{role}_proj", role) for role in ("gate", "up", "down")),
        )
    }
    if first:
        put(model)
    adapted = adapted_model(model, roles=roles).train()
    if not first:
        put(model)
    found = gradients(adapted, lambda: two_passes(adapted))
    assert_close({name.replace("_checkpoint_wrapped_module/", ""): grad for name, grad in found.items()}, expected)


def test_backward_in_another_thread_while_this_one_is_in_a_pass() -> None:
    expected = gradients(plain := adapted_model(tiny_opt()).train(), lambda: loss(plain, ROWS_BT))
    adapted = adapted_model(tiny_opt()).train()
    for block in adapted.base_model.model.decoder.layers:
        wrap(block.fc1, FORMS["not reentrant"])
        wrap(block.fc2, FORMS["reentrant"])
    kept = loss(adapted, ROWS_BT)

    def work() -> None:
        kept.backward()  # type: ignore[no-untyped-call]

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    handle = adapted.base_model.model.decoder.layers[1].register_forward_pre_hook(meanwhile)
    with torch.no_grad():
        loss(adapted, IDS_T)
    handle.remove()
    assert_close({n: p.grad for n, p in adapted.adapters.named_parameters() if p.grad is not None}, expected)


def test_two_adapted_models_in_one_checkpoint() -> None:
    """A teacher's layer and a student's, both run again for one backward."""

    def found(form: Any) -> dict[str, Tensor]:
        one, two = adapted_model(tiny_llama()).train(), adapted_model(tiny_llama(1), {"method": "ia3"}).train()
        inner = two.base_model.model.layers[0].mlp.down_proj
        layer = one.base_model.model.layers[0].mlp.down_proj
        plain = layer.forward

        def both(x: Tensor) -> Tensor:
            with two.router.one_pass():
                two.router.set_context_ids(OTHER_BT)
                return form(lambda x: plain(x) + inner(x), x)  # type: ignore[no-any-return]

        layer.forward = both
        return gradients(
            nn.ModuleDict({"adapters": nn.ModuleList([one.adapters, two.adapters])}), lambda: loss(one, ROWS_BT)
        )

    for form in (FORMS["reentrant"], FORMS["not reentrant"]):
        assert_close(found(form), found(lambda run, x: run(x)))


class Unknown(torch.autograd.Function):
    """A checkpointing that cannot be told from any other function."""

    @staticmethod
    def forward(saved: Any, run: Any, x: Tensor) -> Any:
        saved.run = run
        saved.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(saved: Any, *grads: Tensor) -> Any:
        x = saved.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = saved.run(x)
        return None, torch.autograd.grad(y, x, *grads)[0]


def test_a_checkpointing_that_loses_the_layout_is_refused() -> None:
    adapted = adapted_model(tiny_llama())
    of_mlps(adapted.base_model, Unknown.apply)
    total = loss(adapted, ROWS_BT)
    message = r"^layer model\.layers\.1\.mlp\.gate_proj: .* run again in backward .* torch\.utils\.checkpoint, or"
    with pytest.raises(UserError, match=message):
        total.backward()  # type: ignore[no-untyped-call]


def test_a_function_is_wrapped_once_and_left_alone_outside_a_checkpoint() -> None:
    entered: list[str] = []

    @contextmanager
    def context(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    owners = {name: object() for name in "ab"}

    def run(x: Tensor) -> Tensor:
        for _ in range(3):
            for name, owner in owners.items():
                recompute_within(owner, partial(context, name), had_gradients=True)
        return x.sin().cos()

    x = torch.ones(2, requires_grad=True)
    run(x)
    assert entered == []
    for form in (FORMS["not reentrant"], FORMS["reentrant"]):
        form(run, x).sum().backward()
        assert sorted(entered) == ["a", "b"]
        entered.clear()
