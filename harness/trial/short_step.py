"""A training step without what a lone process need not do, nor wait for.

What DeepSpeed does for several processes, timers and 16 bits is a tenth of a small model's step. Here gradients are not
reduced over one process, and they are clipped and dropped by torch's own functions, for which the host does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def shorten(engine: Any, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """Replace parts of the step of a DeepSpeed engine of one process, ZeRO stage 0, in fp32.

    Args:
        engine: DeepSpeed's.
        parameters: its trainable ones.
        max_norm: to which gradients are clipped; 0: they are not.
    """
    engine.enable_backward_allreduce = False
    engine.zero_grad = partial(_drop, parameters)
    engine.clip_fp32_gradients = partial(nn.utils.clip_grad_norm_, parameters, max_norm, foreach=True)
    engine.optimizer.register_step_pre_hook(partial(_complete, parameters))


def _drop(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


def _complete(parameters: Sequence[nn.Parameter], *_: Any) -> None:
    """Zero for a parameter that no part of the batch used, as DeepSpeed's reduction gives: decay still moves it."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def reading(number: Tensor) -> Callable[[], float]:
    """Start to read a number from its device, without waiting for it.

    Returns:
        Waits for the number alone, not for what the device was told to do afterwards.
    """
    if number.device.type != "cuda":
        return number.item
    host = torch.empty((), dtype=number.dtype, pin_memory=True)
    host.copy_(number.detach(), non_blocking=True)
    read = torch.cuda.Event()  # type: ignore[no-untyped-call]
    read.record()

    def wait() -> float:
        read.synchronize()
        return float(host)

    return wait
