"""Compiles the blocks of a language model for its training steps (torch.compile): the same numbers, up to rounding.

A block is what transformers can checkpoint: a decoder layer with its adapters. All of them share what was compiled, and
sizes are symbols in it, so that neither layers nor batches are compiled one by one. Passes without gradients compute as
ever: they are few, and of many other forms (prompts, one token, caches).
"""

from __future__ import annotations

import logging
import sysconfig
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.core.errors import UserError
from harness.model.packed import packed_layers

BACKEND = "inductor"
logger = logging.getLogger(__name__)


def blocks_of(language_model: nn.Module, adapted: bool = False) -> list[Any]:
    """The blocks of a language model, if it can be compiled.

    Args:
        language_model: of any kind.
        adapted: whether it has adapters; their hooks are compiled.

    Raises:
        UserError: it cannot.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    name = type(language_model).__name__
    blocks = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(
            f"resources.torch_compile: {name} has no blocks of transformers' class GradientCheckpointingLayer, which "
            "are what is compiled; allowed: false"
        )
    if packed_layers(language_model):
        raise UserError(
            "resources.torch_compile: the weights of the language model are packed (backbone.quantization), and "
            "bitsandbytes unpacks them outside of what is compiled; allowed: false"
        )
    if not adapted and any(_has_hooks(module) for block in blocks for module in block.modules()):
        raise UserError(
            f"resources.torch_compile: {name} has forward hooks of its own in its blocks, which are not compiled; "
            "allowed: false"
        )
    return blocks


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def check_compiler() -> None:
    """Check that torch.compile can build what it writes on this machine.

    Raises:
        UserError: it cannot.
    """
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "resources.torch_compile: triton is not installed or does not know this GPU: pip install triton"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError("resources.torch_compile: found no C++ compiler: install g++, or leave it out") from error
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise UserError(
            f"resources.torch_compile: {headers} has no Python.h: install the headers of this Python (python3-dev), or "
            "leave it out"
        )


class Compiled:
    """The blocks of a language model, whose training passes are compiled when they run first.

    Where a block draws random numbers (dropout), it stays as it is: compiled, it would draw others.

    Args:
        blocks: of the language model, with its adapters.

    Attributes:
        why_plain: why blocks are not compiled after all; None: they are, or none has run yet.

    Raises:
        UserError: this machine has no compiler.
    """

    def __init__(self, blocks: list[Any]) -> None:
        check_compiler()
        import torch._dynamo  # takes seconds
        from torch._dynamo.callback import callback_handler
        from torch._inductor import config as inductor_config

        self._seconds = 0.0
        self.why_plain: str | None = None
        self._began = 0.0
        self._open = ExitStack()
        # The layout of a pass is found through modules; its sizes are those of the batch, as the inputs' are.
        self._open.enter_context(torch._dynamo.config.patch(force_nn_module_property_static_shapes=False))
        # In this process: workers of a pool would stay, and count as processes of the trial.
        self._open.enter_context(inductor_config.patch(compile_threads=1))
        callback_handler.register_start_callback(self._starts)
        self._open.callback(callback_handler.remove_start_callback, self._starts)
        callback_handler.register_end_callback(self._ends)
        self._open.callback(callback_handler.remove_end_callback, self._ends)
        self._runs: dict[Any, Callable[..., Any]] = {}
        for block in blocks:
            vars(block)["forward"] = _Block(self, block).compute
            self._open.callback(vars(block).pop, "forward", None)

    def run(self, plain: Any) -> Callable[..., Any]:
        """A class's forward, compiled."""
        if plain not in self._runs:
            self._runs[plain] = torch.compile(plain, backend=BACKEND, dynamic=True)
        return self._runs[plain]

    def stay_plain(self, reason: str) -> None:
        """Compile no more, and nothing that was not yet."""
        if self.why_plain is None:
            self.why_plain = reason
            logger.warning("resources.torch_compile: not compiled: %s", reason)

    def new_s(self) -> float:
        """Seconds that compiling has taken since this was asked last."""
        found, self._seconds = self._seconds, 0.0
        return found

    def close(self) -> None:
        """Give the blocks their own forward back, and free what was compiled."""
        self._open.close()
        torch._dynamo.reset()

    def _starts(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _ends(self, _: Any) -> None:
        self._seconds += time.perf_counter() - self._began


class _Block:
    """The forward of a block: compiled where it trains, its class's elsewhere."""

    def __init__(self, compiled: Compiled, block: Any) -> None:
        self.compiled, self.block = compiled, block
        # Without what transformers puts around it for checkpointing, which stays outside of what is compiled.
        self._plain = getattr(type(block).forward, "__wrapped__", type(block).forward)
        self._known = False  # whether it is known to draw no random numbers

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """``block.forward(…)``."""
        block = self.block
        if self.compiled.why_plain or not (block.training and torch.is_grad_enabled()):
            return type(block).forward(block, *args, **kwargs)
        if not self._known:
            return self._first(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor):  # the first block gets a slice, which would be compiled apart
            args = (args[0].contiguous(), *args[1:])
        run = partial(self.compiled.run(self._plain), block, **kwargs)
        return block._gradient_checkpointing_func(run, *args) if block.gradient_checkpointing else run(*args)

    def _first(self, *args: Any, **kwargs: Any) -> Any:
        on_gpu = torch.cuda.is_available()
        states = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None
        found = type(self.block).forward(self.block, *args, **kwargs)
        self._known = torch.equal(states[0], torch.get_rng_state()) and (
            states[1] is None or torch.equal(states[1], torch.cuda.get_rng_state())
        )
        if not self._known:
            self.compiled.stay_plain(f"{type(self.block).__name__} has dropout, for which it would draw other numbers")
        return found
