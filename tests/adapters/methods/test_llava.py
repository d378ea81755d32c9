"""The LLaVA recipe as a method: its options, its stages, what it trains."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from adapters.base import Stage
from adapters.methods.baselines import Full, FullConfig
from adapters.methods.combination import combine
from adapters.methods.llava import LLaVA, LLaVAConfig
from adapters.methods.lora import LoRA
from harness.core.errors import UserError
from harness.trial.stages import stage_ends
from tests.support.models import tiny_llama


def test_the_projector_first_then_the_language_model_with_it() -> None:
    assert LLaVA(LLaVAConfig()).stages(3) == (Stage(1, False), Stage(2, True))
    method = LLaVA(LLaVAConfig(projector_epochs=4, projector_learning_rate=1e-3))
    assert method.stages(5) == (Stage(4, False, 1e-3), Stage(1, True))


@pytest.mark.parametrize(("projector_epochs", "epochs"), [(1, 1), (3, 3), (4, 2)])
def test_no_epoch_left_for_the_language_model_is_an_error(projector_epochs: int, epochs: int) -> None:
    message = (
        f"projector_epochs: found {projector_epochs} of budget.epochs={epochs}, which leaves no epoch for the language "
        "model; allowed: fewer than budget.epochs"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        LLaVA(LLaVAConfig(projector_epochs=projector_epochs)).stages(epochs)


@pytest.mark.parametrize("embeddings", [True, False])
def test_it_trains_what_full_fine_tuning_does(embeddings: bool) -> None:
    model = tiny_llama()
    expected = [id(p) for p in Full(FullConfig(embeddings=embeddings)).trained(model)]
    assert [id(p) for p in LLaVA(LLaVAConfig(embeddings=embeddings)).trained(model)] == expected


def test_it_has_a_name_of_its_own_and_labels_that_tell() -> None:
    assert LLaVA(LLaVAConfig()).name == "llava"
    assert not LLaVA.grouped
    assert LLaVA(LLaVAConfig()).label() == "LLaVA two-stage"
    assert LLaVA(LLaVAConfig(embeddings=False)).label() == "LLaVA two-stage, embeddings frozen"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_epochs": 0}, "projector_epochs\n.*greater than 0"),
        ({"projector_learning_rate": 0.0}, "projector_learning_rate\n.*greater than 0"),
        ({"projector_epochs": 1.5}, "projector_epochs\n.*valid integer"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LLaVAConfig(**options)


def test_a_combination_has_the_stages_of_its_part() -> None:
    method_class = combine((LoRA, LLaVA))
    method = method_class(method_class.Config(rank=2, projector_epochs=2))
    assert method.stages(5) == (Stage(2, False), Stage(3, True))


# ── Stages in optimizer steps


TWO = (Stage(1, False), Stage(2, True))


@pytest.mark.parametrize(
    ("stages", "batches", "accumulation", "ends"),
    [
        ((Stage(3, True),), 4, 1, [12]),
        (TWO, 4, 1, [4, 12]),
        (TWO, 4, 2, [2, 6]),
        # 5 batches, two to a step: the step over the end of the first epoch belongs to the first stage.
        (TWO, 5, 2, [3, 7]),
        ((Stage(2, False), Stage(1, True)), 5, 3, [4, 5]),
        ((Stage(3, True),), 1, 4, [0]),  # of one stage: all is left over at the end, as ever
    ],
)
def test_stages_end_where_steps_do_and_add_up_to_those_of_one_stage(
    stages: tuple[Stage, ...], batches: int, accumulation: int, ends: list[int]
) -> None:
    assert stage_ends(stages, batches, accumulation) == ends
    assert ends[-1] == 3 * batches // accumulation


@pytest.mark.parametrize(("batches", "accumulation"), [(1, 3), (1, 2), (1, 4)])
def test_a_stage_without_a_step_is_an_error(batches: int, accumulation: int) -> None:
    with pytest.raises(UserError, match=r"budget: \d optimizer steps are too few for 2 stages"):
        stage_ends(TWO, batches, accumulation)
