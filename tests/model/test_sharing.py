"""Training on rows that share their inputs: the same loss and gradients as rows of one target, or none of it.

Shapes: R targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.registry import ADAPTERS
from harness.model.batch import Batch
from harness.model.build import Built, build
from harness.model.sharing import why_not_shared
from tasks.base import Example
from tests.support.adapters import disturb
from tests.support.trials import LORA, spec_of

CPU = torch.device("cpu")
# Their tokens look at other tokens in ways of their own.
ALONE = {"moka", "soft_prompt"}


def built_of(folder: Path, adapter: dict[str, Any], dropout: float = 0.0, **budget: Any) -> Built:
    backbone = {"projector_dropout": dropout, "projector_boundary_tokens": True}
    given = {"examples": 12, "references": "grouped", **budget}
    return build(spec_of(folder, {"learning_rate": 1e-3} | adapter, budget=given, backbone=backbone), CPU)


def batches_of(built: Built, count: int = 13) -> tuple[Batch, Batch]:
    """The same items in rows of their own, and in shared ones."""
    draws = built.order.epoch(1)[:count]
    alone, shared = (built.batches.train(built.splits.train, draws, share) for share in (False, True))
    assert alone.parts is None
    assert shared.parts is not None
    assert len(shared.token_ids_BT) < len(alone.token_ids_BT) == alone.size == shared.size == count
    assert shared.positions < alone.positions
    return alone, shared


def step(built: Built, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss per target token, and its gradients."""
    built.model.zero_grad()
    nll_R, tokens_R = built.model(batch)
    loss = nll_R.sum() / tokens_R.sum()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in built.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [name for name in ADAPTERS.entries() if name not in ALONE])
def test_loss_and_gradients_are_those_of_rows_of_one_target(tmp_path: Path, method: str) -> None:
    built = built_of(tmp_path, {"method": method})
    disturb(built.model.adapters.parameters(), scale=0.05)
    assert why_not_shared(built.model, built.batches) is None
    built.model.double().train()
    alone, shared = batches_of(built)
    (expected, expected_grads), (found, grads) = step(built, alone), step(built, shared)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert grads.keys() == expected_grads.keys() == {n for n, p in built.model.named_parameters() if p.requires_grad}
    for name, grad in expected_grads.items():
        assert (grads[name] - grad).norm() <= 1e-6 * grad.norm(), name
    assert sum(grad.norm().item() for grad in grads.values()) > 1e-3


def test_in_single_precision_the_loss_differs_by_rounding(tmp_path: Path) -> None:
    built = built_of(tmp_path, LORA)
    disturb(built.model.adapters.parameters(), scale=0.05)
    (expected, _), (found, _) = (step(built, batch) for batch in batches_of(built))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", sorted(ALONE))
def test_methods_that_look_at_other_tokens_get_rows_of_their_own(tmp_path: Path, method: str) -> None:
    built = built_of(tmp_path, {"method": method})
    assert why_not_shared(built.model, built.batches) is not None


def test_of_grouped_items_each_picture_has_one_dropout_shared_or_not(tmp_path: Path) -> None:
    built = built_of(tmp_path, LORA, dropout=0.5)
    assert why_not_shared(built.model, built.batches) is None
    built.model.double().train()
    losses = []
    for batch in batches_of(built):
        torch.manual_seed(0)
        losses.append(step(built, batch)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    torch.manual_seed(1)
    other, _ = step(built, batches_of(built)[1])
    assert abs(other - losses[0]) > 1e-4


def test_other_items_have_a_dropout_each_so_they_do_not_share(tmp_path: Path) -> None:
    built = built_of(tmp_path, LORA, dropout=0.5, references="all")
    assert "projector_dropout is drawn for every row" in str(why_not_shared(built.model, built.batches))
    assert why_not_shared(*_parts(built_of(tmp_path, LORA, references="all"))) is None


def _parts(built: Built) -> tuple[Any, Any]:
    return built.model, built.batches


@pytest.mark.parametrize("where", ["adapter", "attention"])
def test_dropout_inside_the_language_model_is_drawn_for_every_position(tmp_path: Path, where: str) -> None:
    built = built_of(tmp_path, LORA | ({"dropout": 0.1} if where == "adapter" else {}))
    if where == "attention":
        for module in built.model.language_model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
    assert "dropout in the language model or its adapters" in str(why_not_shared(built.model, built.batches))


def test_a_model_without_position_ids_does_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = built_of(tmp_path, LORA)
    plain = built.model.language_model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if "position_ids" in kwargs:
            raise TypeError("forward() got an unexpected keyword argument 'position_ids'")
        return plain(*args, **kwargs)

    monkeypatch.setattr(built.model.language_model, "forward", forward)
    assert "unexpected keyword argument 'position_ids'" in str(why_not_shared(built.model, built.batches))


def test_trying_leaves_the_model_and_the_generators_as_they_were(tmp_path: Path) -> None:
    built = built_of(tmp_path, LORA)
    built.model.train()
    before, state = {n: x.clone() for n, x in built.model.state_dict().items()}, torch.get_rng_state()
    assert why_not_shared(built.model, built.batches) is None
    assert all(torch.equal(x, before[n]) for n, x in built.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in built.model.modules())


def test_what_would_be_read_more_is_not_shared(tmp_path: Path) -> None:
    """One pair among many items makes every row longer."""
    built = built_of(tmp_path, LORA)
    by_example = {draw.example: draw for draw in built.order.epoch(1)}
    draws = list(by_example.values())
    pair = next(draw for draw in built.order.epoch(1) if draw not in draws and draw.example == draws[0].example)
    assert built.batches.train(built.splits.train, [*draws, pair], share=True).parts is None
    assert built.batches.train(built.splits.train, [draws[0], pair], share=True).parts is not None


def test_questions_about_one_picture_share_it_and_not_each_other(tmp_path: Path) -> None:
    built = built_of(tmp_path, LORA | {"grouping": "specific"})
    disturb(built.model.adapters.parameters(), scale=0.05)
    built.model.double().eval()
    picture = built.splits.train[0].files[0]
    other = built.splits.train[1].files[0]
    asked = [
        Example(str(n), (file, ("text", question)), (answer,))
        for n, (file, question, answer) in enumerate([
            (picture, "what is on the left?", "a red circle"),
            (picture, "what is above the square?", "nothing"),
            (other, "what is on the left?", "a blue square"),
            (picture, "what is on the right of it?", "two green circles"),
        ])
    ]  # fmt: skip
    rows = [[(asked[n], asked[n].references[0]) for n in own] for own in ((0, 1, 3), (2,))]
    shared = built.batches.make_shared(rows)
    alone = built.batches.make([asked[n] for n in (0, 1, 3, 2)], [asked[n].references[0] for n in (0, 1, 3, 2)])
    assert shared.positions < alone.positions
    (found_R, tokens_R), (expected_R, expected_tokens_R) = built.model(shared), built.model(alone)
    torch.testing.assert_close(found_R, expected_R, rtol=1e-9, atol=0)
    assert tokens_R.tolist() == expected_tokens_R.tolist()


def test_checkpointed_layers_see_the_mask_and_the_contexts_again(tmp_path: Path) -> None:
    built = built_of(tmp_path, LORA)
    disturb(built.model.adapters.parameters(), scale=0.05)
    built.model.double().train()
    _, shared = batches_of(built)
    expected, expected_grads = step(built, shared)
    built.model.language_model.gradient_checkpointing_enable()
    found, grads = step(built, shared)
    torch.testing.assert_close((found, grads), (expected, expected_grads), rtol=1e-9, atol=1e-12)
