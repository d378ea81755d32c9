"""Lets any activation checkpointing of torch run its recomputation inside a context of ours.

A layer that reads the layout of its pass asks whether it runs inside a checkpointed function; if so, what that very
call will run again in backward is wrapped, so that the recomputation finds the same layout. That covers every caller of
``torch.utils.checkpoint.checkpoint`` (reentrant or not, FSDP's ``checkpoint_wrapper``), and reentrant functions of the
same form (DeepSpeed's). torch offers no public place for this: what is read here is tested, torch is pinned, and where
it is not found nothing is wrapped, so that the recomputation finds no layout and is refused.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch.utils.checkpoint import _CheckpointFrame

Context = Callable[[], AbstractContextManager[Any]]


class _Within:
    """A function to run again, inside a context."""

    def __init__(self, owner: object, context: Context, run: Callable[..., Any]) -> None:
        self.owner = owner
        self.context = context
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context():
            return self.run(*args, **kwargs)


def recompute_within(owner: object, context: Context, had_gradients: bool) -> None:
    """Wrap what the checkpointed functions that run now will run again in backward; once for each owner.

    Args:
        owner: whose context it is.
        context: makes the context of one recomputation.
        had_gradients: whether the pass began with gradients. Reentrant checkpointing runs forward without.
    """
    for frame in _checkpointed():
        frame.recompute_fn = _wrapped(frame.recompute_fn, owner, context)
    if had_gradients and not torch.is_grad_enabled():
        for ctx in _reentrant():
            ctx.run_function = _wrapped(ctx.run_function, owner, context)


def _wrapped(run: Any, owner: object, context: Context) -> Any:
    inner = run
    while isinstance(inner, _Within):
        if inner.owner is owner:
            return run
        inner = inner.run
    return _Within(owner, context, run)


def _checkpointed() -> list[Any]:
    """The checkpointed functions in progress, innermost first: their hooks for saved tensors know them."""
    found: list[Any] = []
    popped: list[Any] = []
    top: Any = torch._C._autograd._top_saved_tensors_default_hooks
    while (hooks := top(True)) is not None:
        found += [value for value in _closure(hooks[0]) if isinstance(value, _CheckpointFrame)]
        torch._C._autograd._pop_saved_tensors_default_hooks()
        popped.append(hooks)
    for hooks in reversed(popped):
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return found


def _closure(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def _reentrant() -> list[Any]:
    """The contexts of the autograd functions in progress that keep a function to run again."""
    found = []
    for frame, _ in traceback.walk_stack(None):
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals["ctx"]
            if hasattr(ctx, "run_function"):
                found.append(ctx)
    return found
