"""Whether rows come before positions in a layer's input.

A flattened input (T × B) has the shape of (B × T), and adapters would take the tokens of one context for those of
another. In known architectures this was tested; of layers with roles given explicitly, two tiny passes tell.
B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.core.errors import UserError

_ROWS, _LENGTH = 2, 3  # of the passes; different, so that shapes tell the axes apart
_SAME = 1e-3  # of the largest change: what a token of another row may change by, in layers of experts
_POSITIONS_FIRST = (True, False) * _LENGTH  # which tokens change with the first row


def check_row_order(language_model: Any, paths: Collection[str]) -> set[str]:
    """Check that rows come before positions in the inputs of layers; the model has no adapters yet.

    Args:
        language_model: a causal LM.
        paths: of the layers.

    Returns:
        The paths of the layers of which this is not known, because the model does not run on ``input_ids`` alone, or
        does not reach them.

    Raises:
        UserError: positions come first.
    """
    if not paths or any(p.is_meta for p in language_model.parameters()):
        return set(paths)
    ids_BT = torch.arange(1, 1 + _ROWS * _LENGTH).view(_ROWS, _LENGTH)
    other_BT = ids_BT.clone()
    other_BT[0] += _ROWS * _LENGTH
    try:
        one, other = (_inputs(language_model, paths, ids) for ids in (ids_BT, other_BT))
    except Exception:  # a model of its own: what its forward needs is not known
        return set(paths)
    unknown = set(paths)
    for path in one.keys() & other.keys():
        if _positions_first(one[path], other[path]):
            raise UserError(
                f"layer {path}: positions come before rows in its input, (T × B); adapters need rows and positions, "
                "(B, T) or the two flattened in this order. Leave it out of the explicit roles"
            )
        unknown.discard(path)
    return unknown


def _positions_first(one: Tensor, other: Tensor) -> bool:
    """Whether positions come first in a layer's inputs of two passes that differ in their first row."""
    if tuple(one.shape[:-1]) == (_LENGTH, _ROWS):
        return True
    if one.dim() != 2 or one.shape != other.shape or len(one) != _ROWS * _LENGTH:
        return False
    change_N = (one.float() - other.float()).abs().amax(-1)
    changed = tuple((change_N > _SAME * change_N.max()).tolist())
    return changed == _POSITIONS_FIRST


def _inputs(language_model: Any, paths: Collection[str], ids_BT: Tensor) -> dict[str, Tensor]:
    """The first input of each layer in a pass."""
    found: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found.setdefault(path, args[0].detach().cpu())

    embedding = language_model.get_input_embeddings()
    ids_BT = ids_BT.remainder(embedding.num_embeddings).to(embedding.weight.device)
    handles = [
        language_model.get_submodule(path).register_forward_pre_hook(partial(keep, path)) for path in sorted(paths)
    ]
    try:
        with torch.no_grad(), _evaluating(language_model):
            language_model(input_ids=ids_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, and afterwards each of its modules as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
