"""Builds a trial's model and data from its spec."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from adapters.attach import Adapters
from adapters.placement.router import Router
from harness.check.returned import check_examples, check_same
from harness.core import hub
from harness.core.errors import UserError
from harness.core.origin import during
from harness.core.record import Parameters
from harness.core.registry import identity
from harness.core.weights import FOLDER, check_unchanged
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model import assembly, backbones, parameters
from harness.model.backbones import LanguageModel
from harness.model.batches import BatchMaker
from harness.model.budget import Order, Shares, by_member, choose
from harness.model.compiled import blocks_of
from harness.model.components import (
    check_files,
    empty_encoders,
    make_encoder,
    make_modalities,
    make_task,
    method_of,
    tower_in_step,
)
from harness.model.context_model import ContextModel
from harness.model.features import Features
from harness.model.kept import Kept, Key, bytes_of
from harness.model.on_disk import OnDisk
from harness.model.own_encoder import Connector, OwnEncoder, connector_of
from harness.model.packed import packed_layers
from harness.model.projector import Projector
from harness.model.quantisation import check_frozen
from harness.model.row_lengths import RowLengths
from harness.model.tower import Tower, group_of_pictures, whole_of
from tasks.base import Example, Modality, Split, Task
from tasks.encoder import Encoder
from tasks.parsed import ParsedExamples
from tasks.splits import SPLITS

_MOST_TEXTS = 100_000  # whose tokens are kept from one trial for the next
_PARTITIONED = 3  # the ZeRO stage that partitions weights
_EXAMPLE_BYTES = 1000  # about, of the objects of one, besides its texts


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


@dataclass(frozen=True)
class Common:
    """What trials of one process that differ at most in their adapters have together.

    Attributes:
        data: the data and the encoders.
        language_model: without adapters; each trial attaches its own to a ``shared_copy``.
        batches: makes their batches.
    """

    data: TrialData
    language_model: LanguageModel
    batches: BatchMaker


def common_of(
    spec: TrialSpec,
    device: torch.device,
    kept: Kept | None = None,
    resources: Resources | None = None,
    disk: OnDisk | None = None,
) -> Common:
    """What a trial and others that differ from it at most in their adapters have together; arguments as of ``build``.

    Raises:
        UserError: as in ``build``.
    """
    kept = kept or Kept(0)
    data, language_model = read_data(spec, device, kept, disk), load_language_model(spec, kept)
    compute_as(language_model.model, resources or Resources())
    return Common(data, language_model, BatchMaker(data.features, language_model, spec.budget, spec.pinned_backbone))


def shared_copy(language_model: Any) -> Any:
    """A copy whose parameters and buffers are those of the original: hooks on one of them leave the other alone."""
    return copy.deepcopy(language_model, {id(x): x for x in (*language_model.parameters(), *language_model.buffers())})


def choose_splits(spec: TrialSpec, task: Task) -> Splits:
    """Select the training examples of the budget and the evaluation examples.

    Raises:
        UserError: a split has fewer examples than the spec requires, or the selection has none of a mixture's task.
    """
    return choose_from(spec, task, read_splits(spec, task))


def read_splits(spec: TrialSpec, task: Task) -> dict[Split, Sequence[Example]]:
    """All examples of the task.

    Raises:
        UserError: they cannot be read, or two reads differ.
    """
    splits = {split: _read_twice(task, spec.task.name, split) for split in SPLITS}
    check_examples(splits, spec.task.name)
    return splits


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
    check_same(first, second, name, split)
    return first


def _shares(task: Task, train: Sequence[Example]) -> Shares | None:
    """The shares of a mixture's tasks, from their whole training splits; None for a task that is not a mixture."""
    if len(task.members()) < 2:
        return None
    return task.shares({member: len(indices) for member, indices in by_member(train).items()})


def order_of(spec: TrialSpec, task: Task, train: Sequence[Example], whole: Sequence[Example] | None = None) -> Order:
    """The order in which a trial trains on the examples of its budget.

    Args:
        spec: of the trial.
        task: of the examples.
        train: of the budget.
        whole: the whole training split, from which the shares of a mixture follow; None: it is read.
    """
    return Order(train, spec.seed, spec.budget.references, _shares(task, whole or task.examples("train")))


def build(
    spec: TrialSpec,
    device: torch.device,
    data: TrialData | None = None,
    kept: Kept | None = None,
    common: Common | None = None,
    resources: Resources | None = None,
    disk: OnDisk | None = None,
) -> Built:
    """Load the backbones, attach the adapters, read the data.

    Args:
        spec: of the trial.
        device: of the model.
        data: of a trial that differs at most in its adapter and learning rate; None: it is read.
        kept: what earlier trials of this process have left for it, and it for later ones.
        common: what it has together with other trials, whose language model it leaves as it is.
        resources: for how the language model computes; ``common`` computes already so.
        disk: the cache of features; None: they are kept in memory.

    Raises:
        UserError: a backbone, the data or the weights of ``init_from`` could not be loaded, a backbone has other
            weights than when the trial was planned or a plugin other data files, or the language model lacks the roles
            that the adapter acts on.
    """
    kept = kept or Kept(0)
    if data is not None and _in_step(data.features.encoders) != tower_in_step(spec):
        data = None  # the other trial reads other features
    data = common.data if common else data or read_data(spec, device, kept, disk)
    features = data.features
    if common:
        loaded, batches = common.language_model, common.batches
        language_model = replace(loaded, model=shared_copy(loaded.model))
    else:
        language_model = load_language_model(spec, kept)
        compute_as(language_model.model, resources or Resources())
        batches = BatchMaker(features, language_model, spec.budget, spec.pinned_backbone)
    widths = {context: features.width(context) for context in data.task.modalities}
    with during(f"adapter {spec.adapter.method} on {spec.backbone.language_model}"):
        model = assemble(spec, language_model.model, widths, connector_of(features.encoders))
    for tower in model.projectors.modules():
        if isinstance(tower, Tower):
            tower.with_own_values()
    assembly.load(spec, model)
    model.to(device)
    return Built(
        task=data.task,
        model=model,
        batches=batches,
        splits=data.splits,
        order=replace(data.order, length_of=_lengths(spec, batches, data.splits)),
        parameters=parameters.count_parameters(model, features.encoders.values()),
    )


def _lengths(spec: TrialSpec, batches: BatchMaker, splits: Splits) -> RowLengths | None:
    """The lengths of rows, where they decide on the batches."""
    grouped = spec.optimizer.train_sampling_strategy == "group_by_length"
    return RowLengths(batches, splits.train) if grouped else None


def load_language_model(spec: TrialSpec, kept: Kept) -> LanguageModel:
    """The language model of a trial: with parameters of its own, whose values are the kept ones where it is frozen.

    Code from the hub may make models that cannot be copied: these are loaded for each trial.

    Raises:
        UserError: it could not be loaded.
    """
    backbone, fingerprint = spec.pinned_backbone, spec.fingerprints.get("language_model")
    if fingerprint is None or backbone.trust_remote_code:
        return backbones.load_language_model(backbone)
    form = (backbone.dtype, backbone.quantization, backbone.model is not None)
    key: Key = ("language model", backbone.pinned_language_model, fingerprint, *form)
    kept.forget("language model", but=key)
    method = method_of(spec.adapter, spec.relative_to)

    def trains(loaded: LanguageModel) -> bool:
        if tower_in_step(spec):  # parts of the model are found in all of it
            return "language" in method.reaches() and not method.only_changes_layers
        return any(True for _ in method.trained(loaded.model))

    loaded = kept.of(key, lambda: backbones.load_language_model(backbone), lambda of: bytes_of(of.model), spare=trains)
    if len(loaded.tokens) > _MOST_TEXTS:
        loaded.tokens.clear()
    if key not in kept:
        return loaded
    model = copy.deepcopy(loaded.model) if trains(loaded) else _with_own_parameters(loaded.model)
    return replace(loaded, model=model)


def compute_as(language_model: Any, resources: Resources) -> None:
    """Set how a language model computes: results are the same up to rounding.

    Raises:
        UserError: it has no gradient checkpointing, or not this implementation of attention, or cannot be compiled, or
            its weights are packed and would be partitioned.
    """
    if resources.zero_stage == _PARTITIONED and packed_layers(language_model):
        raise UserError(
            f"resources.zero_stage: found {_PARTITIONED}, which spreads weights over the workers; quantised ones stay "
            "whole; allowed: 0, 1 or 2"
        )
    if resources.attn_implementation is not None:
        try:
            language_model.set_attn_implementation(resources.attn_implementation)
        except (ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"resources.attn_implementation: found {resources.attn_implementation!r}; "
                f"{type(language_model).__name__} cannot use it here: {reason[:300]}"
            ) from error
    if resources.gradient_checkpointing:
        if not getattr(language_model, "supports_gradient_checkpointing", False):
            raise UserError(
                f"resources.gradient_checkpointing: {type(language_model).__name__} has none; allowed: false"
            )
        language_model.activation_checkpointing_enable({"use_reentrant": False})
    if resources.torch_compile:
        blocks_of(language_model)


def _with_own_parameters(language_model: Any) -> Any:
    """A copy whose parameters are new, so that moving or partitioning them leaves the original alone.

    Their values are those of the original, in the same memory, as long as nobody moves them.
    """
    parameters = {id(p): nn.Parameter(p.data, requires_grad=False) for p in language_model.parameters()}
    return copy.deepcopy(language_model, parameters | {id(x): x.detach() for x in language_model.buffers()})


def read_data(spec: TrialSpec, device: torch.device, kept: Kept | None = None, disk: OnDisk | None = None) -> TrialData:
    """Read the data, and load the encoders; ``disk`` is the cache of features, if there is one.

    Raises:
        UserError: as in ``build``.
    """
    kept = kept or Kept(0)
    source = (spec.task.plugin.model_dump_json(), json.dumps(spec.task.config, sort_keys=True), spec.relative_to)
    task, examples = kept.of(("examples", *source), lambda: _read_task(spec), lambda read: _bytes_of(read[1].values()))
    chosen = (spec.seed, spec.budget.examples, spec.eval.validation_examples, spec.eval.test_examples)
    splits = kept.of(("splits", *source, *chosen), lambda: choose_from(spec, task, examples), _list_bytes)
    check_unchanged(spec.pinned_backbone.model_dump(), spec.fingerprints)
    check_files(spec)
    modalities = make_modalities(spec)
    keys = {name: encoder_key(spec, name, device) for name in modalities}
    encoders = {name: _encoder(spec, name, modality, device, kept, keys[name]) for name, modality in modalities.items()}
    if disk is not None:
        augmented = identity({"task": spec.task.plugin.model_dump(), "config": spec.task.config})
        disk = replace(disk, source=json.dumps(augmented, sort_keys=True))
    features = Features(task, modalities, encoders, device, kept, keys, disk)
    return TrialData(task, splits, order_of(spec, task, splits.train, examples["train"]), features)


def _read_task(spec: TrialSpec) -> tuple[Task, dict[Split, Sequence[Example]]]:
    task = make_task(spec)
    with during(f"preparation of task {spec.task.name}"):
        task.prepare()
    return task, read_splits(spec, task)


def _bytes_of(splits: Iterable[Sequence[Example]]) -> int:
    """About the memory of examples; those that are mapped are made when they are asked for."""
    return sum(
        _EXAMPLE_BYTES + sum(map(len, example.references)) + sum(len(str(value)) for _, value in example.inputs)
        for examples in splits
        if not isinstance(examples, ParsedExamples)
        for example in examples
    )


def _list_bytes(splits: Splits) -> int:
    return 8 * (len(splits.train) + len(splits.validation) + len(splits.test))


def encoder_key(spec: TrialSpec, modality: str, device: torch.device) -> Key | None:
    """What an encoder on a device depends on; None: it is not known, or code from the hub makes it."""
    backbone = spec.pinned_backbone
    name, fingerprint = backbone.encoders[modality], spec.fingerprints.get(f"encoders.{modality}")
    if modality in backbone.encoder_plugins:
        fingerprint = backbone.encoder_plugins[modality].id
    if backbone.trust_remote_code or (fingerprint is None and not hub.is_builtin(name)):
        return None
    known = "" if fingerprint is not None and fingerprint.startswith(FOLDER) else name  # one folder is like another
    key: Key = (f"encoder of {modality}", spec.task.modalities[modality].id, known, fingerprint, str(device))
    if options := backbone.encoder_options.get(modality):
        key = (*key, json.dumps(options, sort_keys=True))
    if backbone.model is None:
        return key
    return (*key, "of a model", "in the step" if tower_in_step(spec) else backbone.connector, backbone.dtype)


def _encoder(
    spec: TrialSpec, name: str, modality: Modality, device: torch.device, kept: Kept, key: Key | None
) -> Encoder:
    backbone = spec.pinned_backbone

    def load() -> Encoder:
        return make_encoder(backbone, name, modality, in_step=tower_in_step(spec)).to(device)

    with during(f"encoder of modality {name}"):
        if key is None:
            return load()
        kept.forget(f"encoder of {name}", but=key)
        return kept.of(key, load, bytes_of, device.type)


def _in_step(encoders: Mapping[str, Encoder]) -> bool:
    return any(isinstance(encoder, OwnEncoder) and encoder.in_step for encoder in encoders.values())


def assemble(
    spec: TrialSpec, language_model: Any, feature_widths: Mapping[str, int], connector: Connector | Tower | None = None
) -> ContextModel:
    """Assemble the model, and set ``requires_grad`` of its parameters.

    Args:
        spec: for the adapter and the seed of the initialisation.
        language_model: a Hugging Face causal LM.
        feature_widths: context → width of its encoder's features, for every context that is not text.
        connector: of a vision-language model, at the place of the projectors; or its tower too.
    """
    method = method_of(spec.adapter, spec.relative_to)
    language_model.requires_grad_(False)
    base = whole_of(language_model, connector)
    trained = list(method.trained(base))
    if spec.backbone.quantization is not None:
        check_frozen(spec.backbone.quantization, spec.adapter.label, language_model, trained)
    for parameter in trained:
        parameter.requires_grad_(True)
        if parameter.dtype in (torch.bfloat16, torch.float16) and not spec.optimizer.bf16:
            raise UserError(
                f"backbone.dtype: {spec.adapter.label} trains the language model itself, which in "
                f"{str(parameter.dtype).removeprefix('torch.')} rounds most updates away; allowed: fp32, or "
                "optimizer: {bf16: true}, which keeps a copy in fp32"
            )
    router = Router(spec.adapter.grouping)
    # Projectors are drawn from the global generator, so they are the same for all methods with the same seed. Adapters
    # have their own generators.
    torch.manual_seed(spec.seed)
    ungrouped = None if method.grouped else method
    methods, shared = method.for_groups(spec.adapter.group_names), spec.adapter.shared_group
    group = None if base is language_model else group_of_pictures(spec.adapter.grouping, feature_widths)
    adapters = Adapters(base, methods, router, spec.seed, ungrouped, spec.backbone.roles, shared, group)
    if base is not language_model and adapters.model_changes:
        raise UserError(
            f"where: {spec.adapter.label} changes the language model as a whole too, which is not done beside a tower; "
            "allowed: where of the language model alone, or another method"
        )
    adapters.attach(base)
    width = language_model.get_input_embeddings().embedding_dim
    projectors: dict[str, nn.Module] = {
        context: connector or Projector(own, width, spec.backbone) for context, own in feature_widths.items()
    }
    model = ContextModel(language_model, projectors, adapters, router)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "it trains nothing: the language model and the connector of backbone.model are frozen; allowed: "
            "backbone: {connector: trained}, or a method that trains something"
        )
    return model


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
            return assemble(spec, language_model, widths, connector_of(encoders, empty_on=device))
    except UserError as error:
        raise UserError(f"adapters: {spec.adapter.label} on {spec.backbone.language_model}: {error}") from None
