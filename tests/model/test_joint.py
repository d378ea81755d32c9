"""One pass for several models: of every family, values and gradients are those of each model alone.

Shapes: B rows, N encoder tokens, T positions, D width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.attach import Adapters
from adapters.methods.bitfit import BitFit
from adapters.methods.ia3 import IA3
from adapters.methods.lora import LoRA
from adapters.methods.per_group import PerGroup
from adapters.placement.router import Router
from harness.model.batch import Batch
from harness.model.build import shared_copy
from harness.model.context_model import ContextModel
from harness.model.joint import JointModel
from tests.support.adapters import disturb
from tests.support.batches import batch_of, model_of, ungroup
from tests.support.families import OPTIONS, tiny

SPECIFIC = {"image": "image", "text": "text"}
MEMBERS: list[tuple[Any, Any]] = [
    (LoRA(LoRA.Config(rank=2, where="AF")), {"image": "all", "text": "all"}),
    (LoRA(LoRA.Config(rank=3, where="A")), SPECIFIC),
    (None, {"image": None, "text": None}),
    (IA3(IA3.Config(where="F")), SPECIFIC),
    (BitFit(BitFit.Config()), {"image": "vision", "text": None}),
    (PerGroup({"image": LoRA(LoRA.Config(rank=3)), "text": BitFit(BitFit.Config())}), SPECIFIC),
    (LoRA(LoRA.Config(rank=2)), "shared+specific"),
]


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    features_BND = torch.randn(3, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    targets_BT = torch.tensor([[5, 9, 2, -100], [7, 2, -100, -100], [3, 4, 5, 2]])
    return batch_of({"image": features_BND}, targets_BT)


def members_of(base: Any) -> list[ContextModel]:
    found = []
    for number, (method, grouping) in enumerate(MEMBERS):
        shared = "shared" if grouping == "shared+specific" else None
        language_model, router = shared_copy(base), Router(SPECIFIC if shared else grouping)
        groups = [*([shared] if shared else []), *router.groups]
        methods = {} if method is None else method.for_groups(groups)
        adapters = Adapters(language_model, methods, router, seed=number, shared_group=shared)
        adapters.attach(language_model)
        torch.manual_seed(number)
        model = model_of(language_model, {"image": 6}, adapters, router).to(base.dtype)
        disturb([p for p in adapters.parameters() if p.requires_grad], scale=0.1)
        found.append(model.train())
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def alone(model: ContextModel, given: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    nll_R, _ = model(given)
    return nll_R, torch.autograd.grad(nll_R.sum(), trained(model))


@pytest.mark.parametrize("family", OPTIONS)
@pytest.mark.parametrize("alike", [True, False], ids=["rows alike", "rows that differ"])
def test_every_model_computes_what_it_computes_alone(family: str, alike: bool) -> None:
    base = tiny(family, torch.float64)
    for module in base.modules():  # GPT-2 has it by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    models, given = members_of(base), batch() if alike else ungroup(batch())
    expected = [alone(model, given) for model in models]
    joint = JointModel(base)
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [3, 0], [6, 5], [2]):  # members leave
        part = [models[index] for index in chosen]
        scores = joint.score(given, part, [nullcontext] * len(part))
        gradients = torch.autograd.grad(
            [nll_R.sum() for nll_R, _ in scores], [p for model in part for p in trained(model)]
        )
        found = iter(gradients)
        for index, (nll_R, tokens_R) in zip(chosen, scores, strict=True):
            torch.testing.assert_close(nll_R, expected[index][0], rtol=1e-10, atol=1e-10)
            assert tokens_R.tolist() == [3, 2, 4]
            for own in expected[index][1]:
                torch.testing.assert_close(next(found), own, rtol=1e-8, atol=1e-10)
        assert next(found, None) is None
    assert all(not p.requires_grad and p.grad is None for p in joint.language_model.parameters())


def test_a_hook_of_the_language_model_itself_runs_once() -> None:
    base = tiny("llama", torch.float64)
    base.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: 1.5 * output)
    models = members_of(base)[:2]
    scores = JointModel(base).score(batch(), models, [nullcontext] * 2)
    for model, (nll_R, _) in zip(models, scores, strict=True):
        torch.testing.assert_close(nll_R, model(batch())[0], rtol=1e-10, atol=1e-10)
