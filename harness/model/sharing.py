"""Whether a trial may train on rows that share their inputs: the same losses and gradients as rows of one target.

Decided on the model as it is built, before training, on invented rows: so it is the same for all workers and after a
restart. Its adapters are disturbed for the moment, because most of them change nothing before they are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from harness.core.errors import UserError
from harness.model.batches import BatchMaker
from harness.model.context_model import ContextModel
from harness.model.shared_prefix import agrees

_DISTURBANCE = 0.05  # standard deviation


def why_not_shared(model: ContextModel, batches: BatchMaker) -> str | None:
    """Why rows must not be shared in training; None: they may.

    Args:
        model: as built, with whole parameters; it is left as it was.
        batches: of the trial.
    """
    projectors = [module for module in model.projectors.modules() if isinstance(module, nn.Dropout)]
    if batches.budget.references != "grouped" and any(dropout.p > 0 for dropout in projectors):
        return "projector_dropout is drawn for every row; budget.references: grouped draws it once for each picture"
    device = next(model.parameters()).device
    alone, shared = (batch.to(device) for batch in batches.invented())
    with torch.no_grad(), torch.random.fork_rng(_devices(device)), _disturbed(model.adapters), _modes(model):
        model.eval()
        try:
            expected_R, found_R = model(alone)[0], model(shared)[0]
        except (TypeError, ValueError, RuntimeError, UserError) as error:  # no position_ids, or no mask of its own
            return str(error)
        if not agrees(found_R, expected_R, expected_R.dtype):
            return "shared rows give other likelihoods"
        model.language_model.train()
        model.adapters.train()
        before = _states(device)
        model(alone)
        if any(not torch.equal(*pair) for pair in zip(before, _states(device), strict=True)):
            return "dropout in the language model or its adapters is drawn for every position of every row"
    return None


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _states(device: torch.device) -> list[torch.Tensor]:
    """The states of the generators."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(own) for own in _devices(device))]


@contextmanager
def _disturbed(adapters: nn.Module) -> Iterator[None]:
    """The adapters with other parameters, and afterwards as they were, bit by bit."""
    kept = {name: x.detach().clone() for name, x in adapters.state_dict(keep_vars=True).items()}
    generator = torch.Generator().manual_seed(0)
    for p in adapters.parameters():
        if p.is_floating_point():
            p.add_(_DISTURBANCE * torch.randn(p.shape, generator=generator).to(p))
    try:
        yield
    finally:
        for name, x in adapters.state_dict(keep_vars=True).items():
            x.data.copy_(kept[name])


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """The model, and afterwards each of its modules in the mode in which it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
