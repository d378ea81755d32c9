"""Loads the plugins of a trial's spec and instantiates them with their options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.base import AdapterMethod
from adapters.methods.per_group import PerGroup
from adapters.registry import ADAPTERS
from harness.core.errors import UserError
from harness.core.paths import relative_to
from harness.core.registry import plugins_in
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import AdapterChoice, Backbone, GroupChoice
from harness.model import own_encoder
from tasks.base import Modality, Task
from tasks.encoder import Encoder
from tasks.registry import ENCODERS, METRICS, MODALITIES, TASKS


def make_task(spec: TrialSpec) -> Task:
    """The task; its data is not prepared yet."""
    task_class = TASKS.load(spec.task.plugin.target)
    task: Task = task_class(task_class.Config.model_validate(spec.task.config, context=relative_to(spec.relative_to)))
    return task


def method_of(choice: AdapterChoice, start: str | None = None) -> AdapterMethod:
    """The adapter method with its options; relative paths in them start from the folder ``start``.

    Where groups differ, all of their methods as one.
    """
    if choice.groups:
        return PerGroup({group: _method_of(own, start) for group, own in choice.groups.items()})
    return _method_of(choice.of_group(""), start)


def _method_of(choice: GroupChoice, start: str | None) -> AdapterMethod:
    method_class = ADAPTERS.load(*(plugin.target for plugin in choice.plugins))
    # Through JSON, as in validation: options that are lists there are tuples here.
    method: AdapterMethod = method_class(
        method_class.Config.model_validate_json(json.dumps(choice.config), context=relative_to(start))
    )
    return method


def check_files(spec: TrialSpec) -> None:
    """Check that the data files of the spec's plugins are those that it was planned with.

    Raises:
        UserError: one has changed, or cannot be read.
    """
    of_task = [spec.task.plugin, *plugins_in(spec.task.config)]
    metrics = [plugin for member in spec.task.metrics.values() for plugin in member.values()]
    for registry, plugins in (
        (TASKS, of_task),
        (MODALITIES, spec.task.modalities.values()),
        (ENCODERS, spec.backbone.encoder_plugins.values()),
        (METRICS, metrics),
        (ADAPTERS, spec.adapter.plugins),
    ):
        for plugin in plugins:
            registry.check_files(plugin)


def make_modalities(spec: TrialSpec) -> dict[str, Modality]:
    """The modalities of the task's files, by name."""
    return {name: MODALITIES.load(plugin.target)() for name, plugin in spec.task.modalities.items()}


def empty_encoders(spec: TrialSpec) -> dict[str, Encoder]:
    """The encoders without weights, by modality.

    Raises:
        UserError: the configuration of one could not be loaded.
    """
    backbone = spec.pinned_backbone
    found = {}
    for name, modality in make_modalities(spec).items():
        with errors_at(f"encoders.{name}"):
            found[name] = make_encoder(backbone, name, modality, weights=False, in_step=tower_in_step(spec))
    return found


def tower_in_step(spec: TrialSpec) -> bool:
    """Whether a trial's adapter acts on more of a vision-language model than on its language model."""
    if spec.backbone.model is None:
        return False
    return bool(method_of(spec.adapter, spec.relative_to).reaches() - {"language"})


def make_encoder(
    backbone: Backbone, name: str, modality: Modality, weights: bool = True, in_step: bool = False
) -> Encoder:
    """The frozen encoder of a modality: of a plugin, or one that the modality knows, a folder or a hub id.

    Args:
        backbone: with every hub id and folder located.
        name: of the modality.
        modality: reads its files.
        weights: whether they are loaded; else only shapes and checks are there.
        in_step: whether the tower of ``backbone.model`` runs in the training step.

    Raises:
        UserError: it could not be loaded.
    """
    if backbone.model is not None:
        return own_encoder.make(backbone, name, weights, in_step)
    if name in backbone.encoder_plugins:
        own: Encoder = ENCODERS.load(backbone.encoder_plugins[name].target).make(weights)
        return own
    make = modality.encoder if weights else modality.empty_encoder
    options = backbone.encoder_options.get(name)  # of a plugin that knows of none, there are none
    return make(backbone.encoders[name], backbone.trust_remote_code, *([options] if options else []))


_SECTION = re.compile(r"^backbone(\.encoders)?(: | )")


@contextmanager
def errors_at(key: str) -> Iterator[None]:
    """Begin the errors of the block with the key of the section ``backbone`` that names the model."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"backbone.{key}: {_SECTION.sub('', str(error))}") from error
