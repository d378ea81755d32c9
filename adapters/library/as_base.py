"""What training loops ask a model, an adapted model answers as its base: ``transformers.Trainer``, accelerate."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn

# Attributes of the base that are read from the model. Not save_pretrained, which would leave the adapters out.
_OF_BASE = frozenset({
    *("config", "generation_config", "loss_type", "main_input_name", "name_or_path", "device", "dtype"),
    *("hf_device_map", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit", "floating_point_ops"),
    *("get_input_embeddings", "get_output_embeddings", "is_activation_checkpointing", "_no_split_modules"),
})  # fmt: skip


class AsBase(nn.Module):
    """An ``nn.Module`` that answers as its ``base_model``."""

    base_model: Any

    def __getattr__(self, name: str) -> Any:
        if name in _OF_BASE and "base_model" in self._modules:
            return getattr(self._modules["base_model"], name)
        return super().__getattr__(name)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base takes ``num_items_in_batch``; the signature of ``forward`` does not tell."""
        given: bool | None = getattr(self.base_model, "accepts_loss_kwargs", None)
        if given is not None:
            return given
        parameters = inspect.signature(self.base_model.forward).parameters.values()
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def takes_what_the_base_takes(self) -> None:
        """Name the base's arguments in ``inspect.signature(model.forward)``: Trainer drops columns that it lacks."""
        own = inspect.signature(type(self).forward).parameters
        base = inspect.signature(self.base_model.forward).parameters
        more = {name: p for name, p in base.items() if name not in own and p.kind is p.POSITIONAL_OR_KEYWORD}
        named = [p for p in own.values() if p.kind is not p.VAR_KEYWORD][1:]  # without self
        rest = [p for p in own.values() if p.kind is p.VAR_KEYWORD]
        forward: Any = partial(type(self).forward, self)
        by_keyword = [p.replace(kind=p.KEYWORD_ONLY) for p in more.values()]
        forward.__signature__ = inspect.Signature([*named, *by_keyword, *rest])
        vars(self)["forward"] = forward

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base's: recompute activations in backward. ``transformers.Trainer`` calls it."""
        self.base_model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """As the base's."""
        self.base_model.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the base's: the earlier name of ``activation_checkpointing_enable``."""
        self.base_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """As the base's."""
        self.base_model.gradient_checkpointing_disable()

    def _get_name(self) -> str:
        """The name of the base's class: by it ``Trainer`` decides whether label smoothing shifts labels."""
        return type(self.base_model).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())
