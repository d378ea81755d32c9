"""``state_dict`` of an adapted model: what differs from the base, each tensor once, so that checkpoints stay small.

That is what ``AdaptedModel.save`` writes: the adapters, and those of the base's own parameters that are trained. The
frozen base is not in it, and not missed by ``load_state_dict``. Tied weights have one name in it, as safetensors
requires. Hooks rather than overrides, because they also act where the model is a part of another (DDP).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def own_tensors(adapters: nn.Module, base_model: nn.Module, also: Collection[str] = ()) -> dict[str, Tensor]:
    """Name → every tensor that differs from the base, each once; ``also`` names further parameters of the base."""
    named = {f"adapters.{name}": tensor for name, tensor in adapters.state_dict(keep_vars=True).items()}
    own = base_model.named_parameters()
    named |= {f"base_model.{name}": p for name, p in own if p.requires_grad or name in also}
    once = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if once[id(tensor)] == name}


def without_frozen_base(adapted: nn.Module) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of an adapted model, alone or inside another, leave out the rest."""
    adapted.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
    adapted.register_load_state_dict_pre_hook(_begin)  # type: ignore[no-untyped-call]
    adapted.register_load_state_dict_post_hook(_end)  # type: ignore[no-untyped-call]


def _leave_out(adapted: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in list(_others(adapted, state_dict, prefix)):
        del state_dict[key]


def _begin(adapted: nn.Module, _state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    vars(adapted)["_loaded_as"] = prefix  # the hook at the end is not told


def _end(adapted: nn.Module, found: Any) -> None:
    prefix = vars(adapted).pop("_loaded_as", "")
    for key in list(_others(adapted, found.missing_keys, prefix)):
        found.missing_keys.remove(key)


def _others(adapted: Any, keys: Collection[str], prefix: str) -> Iterator[str]:
    """The keys of this model that are no own tensors."""
    own = {prefix + name for name in own_tensors(adapted.adapters, adapted.base_model)}
    mine = (f"{prefix}adapters.", f"{prefix}base_model.")
    yield from (key for key in keys if key.startswith(mine) and key not in own)
