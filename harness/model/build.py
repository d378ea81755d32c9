"""Builds a trial's model and data from its spec."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.attach import Adapters
from adapters.placement.router import Router
from harness.core.errors import UserError
from harness.core.origin import during
from harness.core.record import Parameters
from harness.core.weights import check_unchanged
from harness.experiment.plan import TrialSpec
from harness.model import assembly, backbones, parameters
from harness.model.batches import BatchMaker
from harness.model.budget import Order, Shares, by_member, choose
from harness.model.components import check_files, empty_encoders, make_modalities, make_task, method_of
from harness.model.context_model import ContextModel
from harness.model.features import Features
from harness.model.projector import Projector
from tasks.base import Example, Split, Task
from tasks.encoder import Encoder
from tasks.splits import SPLITS


@dataclass(frozen=True)
class Splits:
    """The examples of a trial: training examples by budget and seed; evaluation examples are the same for all seeds."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class TrialData:
    """The data of a trial and its frozen encoders: what does not depend on the adapter."""

    task: Task
    splits: Splits
    order: Order
    features: Features


@dataclass(frozen=True)
class Built:
    """The model and data of a trial, ready to train."""

    task: Task
    model: ContextModel
    batches: BatchMaker
    splits: Splits
    order: Order
    parameters: Parameters

    @property
    def data(self) -> TrialData:
        """The data and the encoders, without the model."""
        return TrialData(self.task, self.splits, self.order, self.batches.features)


def choose_splits(spec: TrialSpec, task: Task) -> Splits:
    """Select the training examples of the budget and the evaluation examples.

    Raises:
        UserError: a split has fewer examples than the spec requires, or the selection has none of a mixture's task.
    """
    return choose_from(spec, task, {split: _read_twice(task, spec.task.name, split) for split in SPLITS})


def choose_from(spec: TrialSpec, task: Task, examples: Mapping[Split, Sequence[Example]]) -> Splits:
    """As ``choose_splits``, from examples that are already read; ``task`` tells their shares."""
    name, seed = spec.task.name, spec.seed
    train, validation, test = (examples[split] for split in SPLITS)
    splits = Splits(
        choose(train, spec.budget.examples, seed, f"budget.examples: task {name}", _shares(task, train)),
        choose(validation, spec.eval.validation_examples, 0, f"eval.validation_examples: task {name}"),
        choose(test, spec.eval.test_examples, 0, f"eval.test_examples: task {name}"),
    )
    keys = ("budget.examples", "eval.validation_examples", "eval.test_examples")
    for key, chosen in zip(keys, (splits.train, splits.validation, splits.test), strict=True):
        if missing := [repr(member) for member in task.members() if member not in by_member(chosen)]:
            found = f"the {len(chosen):,} selected examples contain none of {', '.join(missing)}"
            raise UserError(f"{key}: task {name}: {found}; use more examples")
    return splits


def _read_twice(task: Task, name: str, split: Split) -> Sequence[Example]:
    """The examples of a split, read twice; only the first difference is reported.

    Raises:
        UserError: the two reads differ in content or order.
    """
    with during(f"task {name}, split {split}"):
        first, second = task.examples(split), task.examples(split)
    if first is not second and list(first) != list(second):
        pairs = enumerate(itertools.zip_longest(first, second))
        number, (one, other) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
        found = " and then ".join("no example" if e is None else f"example {e.id!r}" for e in (one, other))
        raise UserError(
            f"task {name}: {split} changes between two reads: at position {number} there was {found}; "
            "the content and the order of a split must be fixed"
        )
    return first


def _shares(task: Task, train: Sequence[Example]) -> Shares | None:
    """The shares of a mixture's tasks, from their whole training splits; None for a task that is not a mixture."""
    sizes = {member: len(indices) for member, indices in by_member(train).items()}
    return task.shares(sizes) if len(task.members()) > 1 else None


def order_of(spec: TrialSpec, task: Task, train: Sequence[Example]) -> Order:
    """The order in which a trial trains on the examples of its budget."""
    return Order(train, spec.seed, spec.budget.references, _shares(task, task.examples("train")))


def build(spec: TrialSpec, device: torch.device, data: TrialData | None = None) -> Built:
    """Load the backbones, attach the adapters, read the data.

    Args:
        spec: of the trial.
        device: of the model.
        data: of a trial that differs at most in its adapter and learning rate; None: it is read.

    Raises:
        UserError: a backbone, the data or the weights of ``init_from`` could not be loaded, a backbone has other
            weights than when the trial was planned or a plugin other data files, or the language model lacks the roles
            that the adapter acts on.
    """
    data = data or read_data(spec, device)
    features = data.features
    language_model = backbones.load_language_model(spec.pinned_backbone)
    widths = {context: features.width(context) for context in data.task.modalities}
    with during(f"adapter {spec.adapter.method} on {spec.backbone.language_model}"):
        model = assemble(spec, language_model.model, widths)
    assembly.load(spec, model)
    model.to(device)
    return Built(
        task=data.task,
        model=model,
        batches=BatchMaker(features, language_model, spec.budget, spec.backbone),
        splits=data.splits,
        order=data.order,
        parameters=parameters.count_parameters(model, features.encoders.values()),
    )


def read_data(spec: TrialSpec, device: torch.device) -> TrialData:
    """Read the data, and load the encoders.

    Raises:
        UserError: as in ``build``.
    """
    task = make_task(spec)
    with during(f"preparation of task {spec.task.name}"):
        task.prepare()
    splits = choose_splits(spec, task)
    backbone, modalities = spec.pinned_backbone, make_modalities(spec)
    check_unchanged(backbone.model_dump(), spec.fingerprints)
    check_files(spec)
    encoders = {}
    for name, modality in modalities.items():
        with during(f"encoder of modality {name}"):
            encoders[name] = modality.encoder(backbone.encoders[name], backbone.trust_remote_code)
    features = Features(task, modalities, encoders, device)
    return TrialData(task, splits, order_of(spec, task, splits.train), features)


def assemble(spec: TrialSpec, language_model: Any, feature_widths: Mapping[str, int]) -> ContextModel:
    """Assemble the model, and set ``requires_grad`` of its parameters.

    Args:
        spec: for the adapter and the seed of the initialisation.
        language_model: a Hugging Face causal LM.
        feature_widths: context → width of its encoder's features, for every context that is not text.
    """
    method = method_of(spec.adapter, spec.relative_to)
    language_model.requires_grad_(False)
    for parameter in method.trained(language_model):
        parameter.requires_grad_(True)
    router = Router(spec.adapter.grouping)
    # Projectors are drawn from the global generator, so they are the same for all methods with the same seed. Adapters
    # have their own generators.
    torch.manual_seed(spec.seed)
    ungrouped = None if method.grouped else method
    methods = dict.fromkeys(router.groups, method)
    adapters = Adapters(language_model, methods, router, spec.seed, ungrouped, spec.backbone.roles)
    adapters.attach(language_model)
    width = language_model.get_input_embeddings().embedding_dim
    projectors = {context: Projector(own, width, spec.backbone) for context, own in feature_widths.items()}
    return ContextModel(language_model, projectors, adapters, router)


def count_parameters(spec: TrialSpec) -> Parameters:
    """Count the trial's parameters from configurations, without loading weights.

    Raises:
        UserError: the configuration of a backbone could not be loaded, or the adapter does not fit the language model.
    """
    encoders = empty_encoders(spec)
    return parameters.count_parameters(empty_model(spec, encoders), encoders.values())


def empty_model(spec: TrialSpec, encoders: Mapping[str, Encoder], device: str = "meta") -> ContextModel:
    """The model without weights.

    Args:
        spec: of the trial.
        encoders: by modality; only their widths are used.
        device: ``meta`` for shapes alone.

    Raises:
        UserError: as in ``count_parameters``.
    """
    language_model = backbones.build_empty(spec.pinned_backbone, device)
    widths = {context: encoders[modality].width for context, modality in make_task(spec).modalities.items()}
    try:
        with torch.device(device):
            return assemble(spec, language_model, widths)
    except UserError as error:
        raise UserError(f"adapters: {spec.adapter.label} on {spec.backbone.language_model}: {error}") from None
