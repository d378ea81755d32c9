"""Merges adapters into the base model's weights, which then needs no hooks.

Only possible if one group acts on every token: a weight cannot depend on the token.
Shapes: O and I output and input features of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.attach import Adapters
from adapters.base import Delta
from adapters.placement.offload import is_offloaded
from adapters.placement.roles import Target
from harness.core.errors import UserError


@dataclass(frozen=True)
class _Step:
    """One delta of one layer, and the name of its method."""

    method: str
    target: Target
    delta: Delta


def merge_into(language_model: nn.Module, adapters: Adapters) -> None:
    """Merge the adapters into the layers' weights: all of them, or none if one cannot be merged.

    Computed in float64 and rounded to the weight's dtype (bf16 on a bf16 base).

    Args:
        language_model: the model that the adapters were built for.
        adapters: adapters with one group, which owns every token.

    Raises:
        UserError: a method cannot be expressed by the layers' weights (the message names method and layer), or a weight
            is also that of another layer.
    """
    for name in adapters.model_changes:
        raise UserError(f"{name} cannot be merged: it changes the model as a whole, not its layers' weights")
    steps: dict[str, list[_Step]] = {}
    for group in adapters.router.groups:
        for name, target, delta in adapters.deltas_of(group):
            steps.setdefault(target.path, []).append(_Step(name, target, delta))
    holders = _holders(language_model)
    for path, found in steps.items():
        layer = language_model.get_submodule(path)
        others = {other for p in layer.parameters(recurse=False) for other in holders[id(p)] if other != path}
        if others:
            raise UserError(
                f"{found[0].method} cannot be merged at layer {path}: its weight is also that of "
                f"{', '.join(sorted(others))}, which would change with it"
            )
        if is_offloaded(language_model.get_submodule(path)):
            raise UserError(f"{found[0].method} cannot be merged at layer {path}: its weight is offloaded")
    merged = {path: _merged(language_model.get_submodule(path), _in_order(found)) for path, found in steps.items()}
    for path, (weight, bias) in merged.items():
        _write(language_model.get_submodule(path), weight, bias)


def _holders(language_model: nn.Module) -> dict[int, list[str]]:
    """Id of a parameter → the paths of the modules that have it: tied weights have several."""
    holders: dict[int, list[str]] = {}
    for path, module in language_model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(path)
    return holders


def _in_order(steps: Sequence[_Step]) -> list[_Step]:
    """``y = D₂ D₁ (W P₂ P₁ x)``: output changes are merged in the order they act, input changes in reverse."""
    outputs = [step for step in steps if step.delta.acts_on == "output"]
    inputs = [step for step in steps if step.delta.acts_on == "input"]
    return outputs + inputs[::-1]


@torch.no_grad()
def _merged(layer: Any, steps: Sequence[_Step]) -> tuple[Tensor, Tensor]:
    """Merged weight (O, I), or (O,) for a norm, and bias (O,)."""
    weight_OI = _weight(layer, steps[0])
    has_bias = getattr(layer, "bias", None) is not None
    bias_O = layer.bias.detach() if has_bias else weight_OI.new_zeros(weight_OI.shape[0])
    dtype, weight_OI, bias_O = weight_OI.dtype, weight_OI.double().clone(), bias_O.double().clone()
    for step in steps:
        # Copy only the delta: its reference to the layer, if any, must stay a reference.
        delta = copy.deepcopy(step.delta, {id(layer): layer}).double()
        whole = step.target.rows is None or delta.acts_on == "input"
        rows = slice(None) if whole else list(step.target.rows or ())
        try:
            weight_OI[rows], bias_O[rows] = delta.merge(weight_OI[rows], bias_O[rows])
        except UserError as error:
            raise UserError(f"{step.method} cannot be merged at layer {step.target.path}: {error}") from None
    if bias_O.any() and not has_bias and not isinstance(layer, nn.Linear):
        raise UserError(
            f"{steps[-1].method} cannot be merged at layer {steps[0].target.path}: "
            f"a {type(layer).__name__} has no bias for its offset"
        )
    return weight_OI.to(dtype), bias_O.to(dtype)


def _weight(layer: Any, step: _Step) -> Tensor:
    """The whole layer's weight, even if the step's target is a part of a fused layer.

    Raises:
        UserError: the weight cannot be read.
    """
    target = step.target
    if target.role == "norm" and isinstance(getattr(layer, "weight", None), nn.Parameter):
        weight_O: Tensor = layer.weight.detach()
        return weight_O
    try:
        return Target(target.path, target.role, target.in_features, target.out_features, layer=layer).weight().detach()
    except UserError as error:
        raise UserError(f"{step.method} cannot be merged: {error}") from None


@torch.no_grad()
def _write(layer: Any, weight_OI: Tensor, bias_O: Tensor) -> None:
    layer.weight.copy_(weight_OI.T if isinstance(layer, Conv1D) else weight_OI)
    if getattr(layer, "bias", None) is not None:
        layer.bias.copy_(bias_O)
    elif bias_O.any():
        layer.bias = nn.Parameter(bias_O, requires_grad=layer.weight.requires_grad)
