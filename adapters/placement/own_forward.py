"""A linear layer whose forward is taken over, so that its adapters can be computed together with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def is_bare_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one and nothing else: what quantises, offloads or watches it changes one of these."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not _has_hooks(layer)


def is_taken_over(layer: nn.Module) -> bool:
    """Whether a layer has another forward now."""
    return isinstance(getattr(vars(layer).get("forward"), "__self__", None), OwnForward)


def _has_hooks(layer: nn.Module) -> bool:
    return any((layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks))


class OwnForward:
    """Gives a layer another forward until it is removed.

    Args:
        layer: a bare linear layer.
        forward: instead of its class's.
    """

    def __init__(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        self.layer, self.forward, self.removed = layer, forward, False
        # A method rather than this object: torch.compile takes layers whose objects are alike for the same.
        vars(layer)["forward"] = self.compute

    def compute(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The layer's output, from one positional argument."""
        if self.removed:  # what has wrapped this forward still calls it
            return nn.Linear.forward(self.layer, *args, **kwargs)  # type: ignore[arg-type]
        return self.forward(*args)

    def remove(self) -> None:
        """Give the layer its class's forward back."""
        self.removed = True
        if vars(self.layer).get("forward") == self.compute:
            del vars(self.layer)["forward"]
