"""Counts the parameters of a model, with weights or on the ``meta`` device."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from harness.core.record import Parameters
from harness.model.context_model import ContextModel
from harness.model.own_encoder import OwnEncoder
from harness.model.packed import count
from harness.model.tower import Tower


def count_parameters(model: ContextModel, encoders: Iterable[nn.Module]) -> Parameters:
    """Count the parameters of a model and its encoders; tied weights count once.

    The connector of a vision-language model counts as its projector, whether it is trained or not.
    """
    tower = next((own for own in model.projectors.values() if isinstance(own, Tower)), None)
    if tower is not None:  # all of it is in the model
        connector = count(tower.connector)
        encoder, total = count(tower) - connector, count(model)
    else:
        encoders = list(encoders)
        projector = count(model.projectors)
        connector = sum(count(own.connector) for own in encoders if isinstance(own, OwnEncoder))
        encoder = sum(count(module) for module in encoders) - connector
        # One that is trained is one of the projectors.
        connector = projector if any(count(own) for own in model.projectors.values()) else connector
        total = count(model) - projector + connector + encoder
    return Parameters(
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter=count(model.adapters),
        projector=connector,
        language_model=count(model.language_model),
        encoder=encoder,
        total=total,
        by_group=model.adapters.parameters_by_group(),
    )
