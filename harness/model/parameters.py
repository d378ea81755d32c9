"""Counts the parameters of a model, with weights or on the ``meta`` device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from harness.core.record import Parameters
from harness.model.context_model import ContextModel


def count_parameters(model: ContextModel, encoders: Iterable[nn.Module]) -> Parameters:
    """Count the parameters of a model and its encoders; tied weights count once."""
    encoder = sum(_count(module) for module in encoders)
    return Parameters(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter=_count(model.adapters),
        projector=_count(model.projectors),
        language_model=_count(model.language_model),
        encoder=encoder,
        total=_count(model) + encoder,
        by_group=model.adapters.parameters_by_group(),
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
