"""Activation checkpointing: layers that backward runs again get the layout of their own pass.

transformers gives every module that can be checkpointed the function to do it with (``_gradient_checkpointing_func``,
reentrant or not). Before each pass these are wrapped, so that what a module passes to its function carries the layout
with it. A wrapped function without a pass in progress does what it did before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from adapters.placement.router import Layout, Router

_FUNCTION = "_gradient_checkpointing_func"  # transformers, set by gradient_checkpointing_enable


class KeepsLayout:
    """A checkpointing function whose recomputation has the layout that was set when it was called."""

    def __init__(self, router: Router, checkpoint: Callable[..., Any]) -> None:
        self.router = router
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``checkpoint(run, …)``."""
        layout = self.router.in_progress
        if layout is not None:
            run = partial(_run_with, self.router, layout, run)
        return self.checkpoint(run, *args, **kwargs)


def _run_with(router: Router, layout: Layout, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with router.one_pass(layout):
        return run(*args, **kwargs)


class Checkpointing:
    """Wraps the checkpointing functions of one language model, those that are set later too."""

    def __init__(self, language_model: nn.Module, router: Router) -> None:
        self.router = router
        # The class attribute tells which modules can be checkpointed; the instance's, whether they are.
        self.modules = [module for module in language_model.modules() if hasattr(module, "gradient_checkpointing")]
        self.handle = language_model.register_forward_pre_hook(self._wrap)

    def _wrap(self, _module: nn.Module, _args: Any) -> None:
        for module in self.modules:
            if module.gradient_checkpointing:
                function = vars(module).get(_FUNCTION)
                if function is not None and not isinstance(function, KeepsLayout):
                    setattr(module, _FUNCTION, KeepsLayout(self.router, function))

    def undo(self) -> None:
        """Give the modules their own functions back."""
        self.handle.remove()
        for module in self.modules:
            function = vars(module).get(_FUNCTION)
            if isinstance(function, KeepsLayout):
                setattr(module, _FUNCTION, function.checkpoint)
