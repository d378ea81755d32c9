"""Counts the parameters of a model, with weights or on the ``meta`` device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from harness.core.record import Parameters
from harness.model.context_model import ContextModel
from harness.model.image_encoder import ImageEncoder
from harness.model.packed import count


def count_parameters(model: ContextModel, encoders: Iterable[nn.Module]) -> Parameters:
    """Count the parameters of a model and its encoders; tied weights count once.

    The connector of a vision-language model counts as its projector, whether it is trained or not.
    """
    encoders = list(encoders)
    connector = sum(count(own.connector) for own in encoders if isinstance(own, ImageEncoder))
    encoder = sum(count(module) for module in encoders) - connector
    if any(count(projector) for projector in model.projectors.values()):
        connector = 0  # it is one of the projectors
    return Parameters(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter=count(model.adapters),
        projector=count(model.projectors) + connector,
        language_model=count(model.language_model),
        encoder=encoder,
        total=count(model) + encoder + connector,
        by_group=model.adapters.parameters_by_group(),
    )
