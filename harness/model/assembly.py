"""Initialises adapter groups from other trials (Context-PEFT, arXiv 2312.08900, Figure 7).

With ``init_from`` (``harness/experiment/init_sources.py``), a group starts from the trained weights of a group of a
finished trial, with the projectors of its contexts. Options and shapes are compared before any compute, tensors again
when they are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters.attach import Adapters
from adapters.placement.router import Router
from harness.core.errors import UserError
from harness.core.files import digest_of
from harness.core.weights import short
from harness.experiment.init_sources import WEIGHTS, Shapes, check_equal, finished_record, read_section, shapes_of
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import AdapterChoice, Backbone, InitSource
from harness.model.components import make_task, method_of
from harness.model.context_model import ContextModel
from harness.model.tower import group_of_pictures, whole_of

_SHOWN = 3


def check(spec: TrialSpec, model: ContextModel) -> None:
    """Check before a trial starts that its model can be initialised from the sources of ``init_from``.

    Args:
        spec: of the trial.
        model: of the trial, without weights.

    Raises:
        UserError: the backbones differ, the method's groups share weights, or a tensor is missing, unexpected or has
            another shape.
    """
    for group, source in spec.adapter.init_from.items():
        folder = Path(source.trial)
        try:
            record = finished_record(folder)
            theirs: Backbone = read_section(Backbone, folder, record.spec["backbone"])
            known: Mapping[str, str | None] = record.spec.get("fingerprints") or {}
            here, there = (_options(backbone, source, spec) for backbone in (spec.backbone, theirs))
            # The same weights may have other names: a folder, as two experiments in different folders write it.
            alike = [key for key in here if known.get(key) and known[key] == spec.fingerprints.get(key)]
            check_equal(folder, *({k: v for k, v in own.items() if k not in alike} for own in (here, there)))
            _check_weights(spec, source, known)
            _check_separable(spec, model, record.seed)
            _match_tensors(model, group, source)
        except UserError as error:
            raise UserError(f"adapters: {spec.adapter.label}: init_from.{group}: {error}") from None


def _options(backbone: Backbone, source: InitSource, spec: TrialSpec) -> dict[str, Any]:
    """The options that must be equal: the language model, and the encoders and options of the loaded projectors."""
    options = backbone.model_dump(include={"language_model", "roles"})
    if source.projectors:
        for modality in _modalities(source, spec):
            options[f"encoders.{modality}"] = backbone.encoders.get(modality)
            own = backbone.encoder_options.get(modality, {})
            options |= {f"encoders.{modality}.{key}": value for key, value in own.items()}
        options |= {name: value for name, value in backbone.model_dump().items() if name.startswith("projector")}
    return options


def _check_weights(spec: TrialSpec, source: InitSource, theirs: Mapping[str, str | None]) -> None:
    """Check that the models have the weights that the source was trained on, as far as both are known.

    Raises:
        UserError: one has others.
    """
    for key in ("language_model", *(f"encoders.{name}" for name in _modalities(source, spec))):
        here, there = spec.fingerprints.get(key), theirs.get(key)
        if here and there and here != there:
            raise UserError(f"trained with other weights of backbone.{key} ({short(there)}, here {short(here)})")


def _modalities(source: InitSource, spec: TrialSpec) -> list[str]:
    """The modalities whose projectors are loaded."""
    if not source.projectors:
        return []
    modalities = make_task(spec).modalities
    return sorted({modalities[context] for context in source.projectors if context in modalities})


def _check_separable(spec: TrialSpec, model: ContextModel, seed: int) -> None:
    """Check that groups share no trained weights, and that frozen weights, drawn from the seed, are equal.

    Args:
        spec: of the trial.
        model: of the trial, without weights.
        seed: of the source trial.

    Raises:
        UserError: they share some, or the seeds differ.
    """
    method = spec.adapter.method
    base = whole_of(model.language_model, next(iter(model.projectors.values()), None))
    if any(True for _ in method_of(spec.adapter, spec.relative_to).trained(base)):
        raise UserError(f"{method} trains the language model itself, so its groups cannot be loaded separately")
    groups = {f"group_{group}" for group in model.adapters.groups}
    for name, parameter in model.adapters.named_parameters():
        if parameter.requires_grad and not groups & set(name.split(".")):
            raise UserError(f"{method}: all groups share {name}, so they cannot be loaded separately")
    if seed != spec.seed and _frozen(model.adapters):
        raise UserError(
            f"{method} draws frozen weights from the seed ({_frozen(model.adapters)[0]}), and the source trial has "
            f"seed {seed}; allowed: the same seed, here {spec.seed}"
        )


def _frozen(adapters: Any) -> list[str]:
    """Names of the adapters' tensors that are not trained, and so are not saved by a trial."""
    return [name for name, tensor in adapters.state_dict(keep_vars=True).items() if not tensor.requires_grad]


def _match_tensors(model: ContextModel, group: str, source: InitSource) -> dict[str, str]:
    """Parameter of the model → tensor of the source, for all parameters of the group and its projectors.

    Raises:
        UserError: a tensor is missing, unexpected, or has another shape.
    """
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    path = Path(source.trial) / WEIGHTS
    saved = shapes_of(path)
    here, theirs = (dict(_select(names, g, source)) for names, g in ((own, group), (saved, source.group)))
    for problem, names in (("missing:", here.keys() - theirs.keys()), ("unexpected:", theirs.keys() - here.keys())):
        if names:
            raise UserError(f"{path}: {problem} {', '.join(sorted(names)[:_SHOWN])} ({len(names)} tensors)")
    if not here:
        raise UserError(f"{path}: the group {group!r} has no parameters")
    for key, name in here.items():
        if own[name] != saved[theirs[key]]:
            raise UserError(f"{path}: {theirs[key]} has shape {saved[theirs[key]]}; allowed: {own[name]}")
    return {name: theirs[key] for key, name in here.items()}


def _select(names: Shapes, group: str, source: InitSource) -> Iterator[tuple[str, str]]:
    """The tensors of a group and of the source's projectors, as pairs (name without the group's name, name)."""
    prefixes = tuple(f"projectors.{context}." for context in source.projectors)
    for name in names:
        if f"group_{group}" in name.split("."):
            yield _of_any_group(name, group), name
        elif name.startswith(prefixes):
            yield name, name


_SECOND = re.compile(r"(?<=\.changes\.)([^.]+?)_\d+(?=\.)")  # "lora_2", where groups have LoRA of other ranks


def _of_any_group(name: str, group: str) -> str:
    """The name of a group's tensor without what depends on the group, and on the methods of the other groups."""
    parts = _SECOND.sub(r"\1", name).split(".")
    return ".".join("group" if part == f"group_{group}" else part for part in parts)


def load(spec: TrialSpec, model: ContextModel) -> None:
    """Load the weights of ``init_from`` into a newly built model on the CPU.

    Raises:
        UserError: they have changed since the spec was made, or do not fit.
    """
    for group, source in spec.adapter.init_from.items():
        path = Path(source.trial) / WEIGHTS
        if not path.is_file() or digest_of(path) != source.weights_sha256:
            raise UserError(f"{path}: the weights have changed since this trial was planned; run the experiment again")
        pairs = _match_tensors(model, group, source)
        parameters = dict(model.named_parameters())
        with safe_open(path, framework="pt") as file:
            for name, theirs in pairs.items():
                parameters[name].data.copy_(file.get_tensor(theirs))
        if _frozen(model.adapters):
            _check_frozen(spec, model, group, source)


def _check_frozen(spec: TrialSpec, model: ContextModel, group: str, source: InitSource) -> None:
    """Check that both trials have the same frozen weights, by drawing those of the source again.

    Raises:
        UserError: they differ.
    """
    record = finished_record(Path(source.trial))
    adapter: AdapterChoice = read_section(AdapterChoice, Path(source.trial), record.spec["adapter"])
    router = Router(adapter.grouping)
    methods = method_of(adapter, record.spec.get("relative_to")).for_groups(adapter.group_names)
    base = whole_of(model.language_model, next(iter(model.projectors.values()), None))
    medium = None if base is model.language_model else group_of_pictures(adapter.grouping, model.projectors)
    shared = adapter.shared_group
    built = Adapters(base, methods, router, record.seed, None, spec.backbone.roles, shared, medium)
    theirs = {_of_any_group(name, source.group): tensor for name, tensor in built.state_dict().items()}
    ours = model.adapters.state_dict()
    for name in _frozen(model.adapters):
        if not {f"group_{other}" for other in model.adapters.groups if other != group} & set(name.split(".")):
            there = _of_any_group(name, group)
            if there not in theirs or not torch.equal(ours[name], theirs[there]):
                raise UserError(f"{source.trial}: the frozen weights that {adapter.method} drew differ here ({name})")
