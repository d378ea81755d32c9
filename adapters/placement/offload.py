"""Where a layer computes and where its weights are, also if accelerate offloads or dispatches the model.

accelerate keeps an offloaded weight outside the model, whose own parameter is then on the meta device, and puts the
numbers in for the duration of the layer's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")  # accelerate's add_hook_to_module
    yield from getattr(hook, "hooks", () if hook is None else (hook,))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the weights of the module, or of a part of it, elsewhere."""
    return any(getattr(hook, "offload", False) for part in module.modules() for hook in _hooks(part))


def device_of(layer: nn.Module) -> torch.device | None:
    """The device on which a layer computes; None: it has no parameters."""
    for module in layer.modules():
        for hook in _hooks(module):
            if getattr(hook, "offload", False) and getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        own = next(module.parameters(recurse=False), None)
        if own is not None:
            return own.device
    return None


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of a layer's adapters: fp32, or float64 on a float64 layer. Small updates are lost in 16 bits."""
    return torch.float64 if any(p.dtype == torch.float64 for p in layer.parameters()) else torch.float32


def tensor_of(module: Any, name: str) -> Any:
    """The attribute ``name`` of a module; of an offloaded weight its values, wherever they are kept."""
    value = getattr(module, name, None)
    if isinstance(value, Tensor) and value.is_meta:
        for hook in _hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                return hook.weights_map[name]
    return value
