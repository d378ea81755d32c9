"""What only passes show: which axes a layer's inputs have, and whether the layer runs at all.

Shapes only, so that nothing waits for the device. B rows, T positions of a pass.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.core.errors import UserError


class _OfThread(threading.local):
    rows: int | None = None  # of the pass of the language model in progress; None: not known
    length: int | None = None  # its positions

    def __reduce__(self) -> tuple[type[_OfThread], tuple[()]]:
        return _OfThread, ()


class Passes:
    """The passes of one language model: their number of rows, and which layers have run.

    Args:
        paths: of the layers that must run in a pass.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._current = _OfThread()
        self._waiting = set(paths)
        self.unordered: frozenset[str] = frozenset()  # layers that may have positions before rows

    @property
    def rows(self) -> int | None:
        """B of the pass in progress; None: the language model was not called as a whole."""
        return self._current.rows

    @property
    def length(self) -> int | None:
        """T of the pass in progress; None: not known."""
        return self._current.length

    def attach(self, language_model: nn.Module) -> list[RemovableHandle]:
        """Watch the passes of a model."""
        return [
            language_model.register_forward_pre_hook(self._begins, with_kwargs=True),
            language_model.register_forward_hook(self._ends, always_call=True),
        ]

    def ran(self, path: str) -> None:
        """A layer with adapters ran."""
        if self._waiting:
            self._waiting.discard(path)

    def _begins(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = kwargs.get("inputs_embeds")
        given = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
        shape = given.shape[:2] if isinstance(given, Tensor) and given.dim() > 1 else (None, None)
        self._current.rows, self._current.length = shape

    def _ends(self, module: nn.Module, _args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._current.rows = self._current.length = None
        if not self._waiting or output is None or (module.training and _drops_layers(module)):
            return  # output is None: forward failed
        missing, self._waiting = sorted(self._waiting), set()
        if not _has_compiled():
            raise UserError(
                f"layers with adapters did not run in the first pass: {', '.join(missing)}; their weights are used "
                "directly, or this input does not reach them. Leave them out: other roles in 'where', or explicit roles"
            )


def _has_compiled() -> bool:
    """Whether this process compiled something: a compiled layer runs without the Python code that tells that it ran."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported here, because that takes a second
    return dynamo is not None and dynamo.counters["frames"]["total"] > 0


def _drops_layers(language_model: Any) -> bool:
    config = getattr(language_model, "config", None)
    return any((getattr(config, name, 0) or 0) > 0 for name in ("layerdrop", "decoder_layerdrop"))


def input_of(path: str, args: tuple[Any, ...], output: Any = None) -> Tensor:
    """A layer's input, of which its adapters need one tensor, as they need one output.

    Raises:
        UserError: the layer is called in another way.
    """
    if not args or not isinstance(args[0], Tensor):
        found = type(args[0]).__name__ if args else "keyword arguments only"
        raise UserError(f"layer {path}: its input is {found}; adapters need a tensor as the first argument")
    if output is not None and not isinstance(output, Tensor):
        raise UserError(f"layer {path}: its output is a {type(output).__name__}; adapters need a tensor")
    return args[0]


def check_axes(path: str, x: Tensor, passes: Passes, length: int) -> None:
    """Check that a layer sees rows and positions, in this order, as two axes or as one.

    Args:
        path: of the layer.
        x: its input; features are the last axis.
        passes: the pass in progress.
        length: T of the layout.

    Raises:
        UserError: it does not.
        RuntimeError: the layout is that of another batch.
    """
    axes, rows = tuple(x.shape[:-1]), passes.rows
    given = passes.length
    if given not in (None, length) and axes in ((rows, given), ((rows or 0) * (given or 0),)):
        raise RuntimeError(f"the layout covers {length} positions but the batch has {given}; set it before forward")
    if len(axes) == 1:
        fits = axes[0] == rows * length if rows is not None else axes[0] % max(length, 1) == 0
        if fits and min(rows or 1, length) > 1 and path in passes.unordered:
            raise UserError(
                f"layer {path}: its input has rows and positions flattened, and whether rows come first is not known, "
                "because the model does not run on input_ids alone. Leave it out of the explicit roles"
            )
    else:
        fits = len(axes) > 1 and axes[1] == length and axes[0] == (axes[0] if rows is None else rows)
    if not fits:
        raise UserError(
            f"layer {path}: its input has the axes {axes} before the features; adapters need rows and positions, "
            f"({'rows' if rows is None else rows}, {length}) here, or the two flattened. Leave it out: other roles in "
            "'where', or explicit roles"
        )
