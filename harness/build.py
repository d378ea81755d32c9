"""TrialSpec → a live model and its data. Plugins come by the ``package.module:Class`` that the spec carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.router import Router
from harness import backbones, measure
from harness.batches import BatchMaker
from harness.budget import choose
from harness.errors import UserError
from harness.experiment import AdapterChoice
from harness.features import Features
from harness.model import ContextModel
from harness.plan import TrialSpec
from harness.record import Parameters
from harness.registry import ADAPTERS, MODALITIES, TASKS
from tasks.base import Example, Task


@dataclass(frozen=True)
class Splits:
    """The examples a trial works on. Training examples are the budget's; evaluation ones are the same for all seeds."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Built:
    """A trial ready to train."""

    model: ContextModel
    batches: BatchMaker
    splits: Splits
    parameters: Parameters


def make_task(spec: TrialSpec) -> Task:
    """The task, its data not prepared yet."""
    task_class = TASKS.load(spec.task.target)
    task: Task = task_class(task_class.Config.model_validate(spec.task.config))
    return task


def choose_splits(spec: TrialSpec, task: Task) -> Splits:
    """The budget's training examples and the evaluation examples.

    Raises:
        UserError: a split has fewer examples than the spec asks for.
    """
    name = spec.task.name
    return Splits(
        choose(task.examples("train"), spec.budget.examples, spec.seed, f"budget.examples: task {name}"),
        choose(task.examples("validation"), spec.eval.validation_examples, 0, f"eval.validation_examples: task {name}"),
        choose(task.examples("test"), spec.eval.test_examples, 0, f"eval.test_examples: task {name}"),
    )


def method_of(choice: AdapterChoice) -> AdapterMethod:
    """The adapter method with its options."""
    method_class = ADAPTERS.load(choice.target)
    # By way of JSON, as the options were read: a list there is a tuple here.
    method: AdapterMethod = method_class(method_class.Config.model_validate_json(json.dumps(choice.config)))
    return method


def build(spec: TrialSpec, device: torch.device) -> Built:
    """Load the backbones, attach the adapters, read the data.

    Raises:
        UserError: a backbone or the data cannot be had, or the language model lacks the roles the adapter acts on.
    """
    task = make_task(spec)
    task.prepare()
    splits = choose_splits(spec, task)
    language_model = backbones.load_language_model(spec.backbone)
    by_context = type(task).modalities
    encoders = {c: backbones.load_encoder(modality, spec.backbone) for c, modality in by_context.items()}
    modalities = {c: MODALITIES.load(spec.task.modalities[modality])() for c, modality in by_context.items()}
    widths = {context: encoder.width for context, encoder in encoders.items()}
    model = assemble(spec, language_model.model, widths, language_model.bos_id).to(device)
    features = Features(modalities, encoders, device)
    return Built(
        model=model,
        batches=BatchMaker(features, language_model, spec.budget.max_target_length),
        splits=splits,
        parameters=measure.count_parameters(model, encoders.values()),
    )


def assemble(spec: TrialSpec, language_model: Any, feature_widths: Mapping[str, int], bos_id: int) -> ContextModel:
    """Put the parts together and say what is trained.

    Args:
        spec: names the adapter and the seed of the initialisation.
        language_model: a Hugging Face causal LM.
        feature_widths: context → width of its encoder's features.
        bos_id: token that opens the sequence.
    """
    method = method_of(spec.adapter)
    language_model.requires_grad_(False)
    for parameter in method.trained(language_model):
        parameter.requires_grad_(True)
    router = Router(spec.adapter.grouping)
    target_context = list(spec.adapter.grouping)[-1]
    # The global generator draws the projectors: the same for every method of a seed. Adapters have their own.
    torch.manual_seed(spec.seed)
    ungrouped = None if method.grouped else method
    methods = dict.fromkeys(router.groups, method)
    adapters = Adapters(language_model, methods, router, spec.seed, ungrouped, spec.backbone.roles)
    adapters.attach(language_model)
    dropout = spec.backbone.projector_dropout
    return ContextModel(language_model, feature_widths, adapters, router, target_context, bos_id, dropout)


def count_parameters(spec: TrialSpec) -> Parameters:
    """The parameters the trial will have, from configurations alone: nothing is loaded or downloaded if it is known.

    Raises:
        UserError: the configuration of a backbone cannot be had, or the adapter does not fit the language model.
    """
    task = TASKS.load(spec.task.target)
    language_model, encoders = backbones.build_empty(spec.backbone)
    widths = {context: encoders[modality][1] for context, modality in task.modalities.items()}
    try:
        with torch.device("meta"):
            model = assemble(spec, language_model, widths, bos_id=0)
    except UserError as error:
        raise UserError(f"adapters: {spec.adapter.label} on {spec.backbone.language_model}: {error}") from None
    return measure.count_parameters(model, [encoder for encoder, _ in encoders.values()])
