"""Adapter groups trained in different trials, put together in one model (Context-PEFT, arXiv 2312.08900, Figure 7).

``init_from`` (``harness/experiment/init_sources.py``) lets a group start from the trained weights of a finished trial's
group, with the projectors of its contexts. What must agree is compared before anything is computed; what is loaded is
compared tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from adapters.attach import Adapters
from adapters.placement.router import Router
from harness.core.errors import UserError
from harness.core.files import digest_of
from harness.experiment.init_sources import WEIGHTS, Shapes, compare, finished, read_section, shapes_of
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import AdapterChoice, Backbone, InitSource
from harness.model.components import make_task, method_of
from harness.model.context_model import ContextModel

_SHOWN = 3


def check(spec: TrialSpec, model: ContextModel) -> None:
    """See before a trial is started that every group it takes over fits.

    Args:
        spec: of the trial.
        model: the trial's, without weights.

    Raises:
        UserError: the backbones differ, the method's groups cannot be parted, or a tensor is missing, left over or of
            another shape.
    """
    for group, source in spec.adapter.init_from.items():
        folder = Path(source.trial)
        try:
            record = finished(folder)
            theirs: Backbone = read_section(Backbone, folder, record.spec["backbone"])
            compare(folder, *(_backbone(backbone, source, spec) for backbone in (spec.backbone, theirs)))
            _check_parted(spec, model, record.seed)
            _pairs(model, group, source)
        except UserError as error:
            raise UserError(f"adapters: {spec.adapter.label}: init_from.{group}: {error}") from None


def _backbone(backbone: Backbone, source: InitSource, spec: TrialSpec) -> dict[str, Any]:
    """What the weights were trained for: the language model, and the encoders and options of the projectors."""
    options = backbone.model_dump(include={"language_model", "roles"})
    if source.projectors:
        modalities = make_task(spec).modalities
        used = {modalities[context] for context in source.projectors if context in modalities}
        options |= {f"encoders.{name}": backbone.encoders.get(name) for name in sorted(used)}
        options |= {name: value for name, value in backbone.model_dump().items() if name.startswith("projector")}
    return options


def _check_parted(spec: TrialSpec, model: ContextModel, seed: int) -> None:
    """See that what the method trains is each group's own, and what it draws without training it is the same.

    Raises:
        UserError: it is not.
    """
    method = spec.adapter.method
    if any(p.requires_grad for p in model.language_model.parameters()):
        raise UserError(f"{method} trains the language model's own weights, which two trials cannot share")
    parts = {f"group_{group}" for group in model.router.groups}
    for name, parameter in model.adapters.named_parameters():
        if parameter.requires_grad and not parts & set(name.split(".")):
            raise UserError(f"{method}: all groups share {name}, so none of them can be taken alone")
    if seed != spec.seed and _frozen(model.adapters):
        raise UserError(
            f"{method} draws frozen weights from the seed ({_frozen(model.adapters)[0]}), and the seeds differ: "
            f"{spec.seed} here, {seed} there; they must be the same"
        )


def _frozen(adapters: Any) -> list[str]:
    """What the adapters keep but do not train, and a trial does not save."""
    return [name for name, tensor in adapters.state_dict(keep_vars=True).items() if not tensor.requires_grad]


def _pairs(model: ContextModel, group: str, source: InitSource) -> dict[str, str]:
    """Parameter of the model → tensor of the source, for all that the group and its projectors have.

    Raises:
        UserError: one has no counterpart, or one of another shape.
    """
    own = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    there = shapes_of(Path(source.trial) / WEIGHTS)
    here, theirs = (dict(_of(names, g, source)) for names, g in ((own, group), (there, source.group)))
    place = Path(source.trial) / WEIGHTS
    for what, missing in (("lacks", here.keys() - theirs.keys()), ("has too many:", theirs.keys() - here.keys())):
        if missing:
            raise UserError(f"{place}: {what} {', '.join(sorted(missing)[:_SHOWN])} ({len(missing)} tensors)")
    if not here:
        raise UserError(f"{place}: the group {group!r} has no parameters")
    for key, name in here.items():
        if own[name] != there[theirs[key]]:
            raise UserError(f"{place}: shape of {theirs[key]} differs: {own[name]} here, {there[theirs[key]]} there")
    return {name: theirs[key] for key, name in here.items()}


def _of(names: Shapes, group: str, source: InitSource) -> Iterator[tuple[str, str]]:
    """(Name without the group, name) of the tensors of a group and of the projectors."""
    prefixes = tuple(f"projectors.{context}." for context in source.projectors)
    for name in names:
        parts = name.split(".")
        if f"group_{group}" in parts:
            yield ".".join("group" if part == f"group_{group}" else part for part in parts), name
        elif name.startswith(prefixes):
            yield name, name


def load(spec: TrialSpec, model: ContextModel) -> None:
    """Put the weights of ``init_from`` into a model that was just built, on the CPU.

    Raises:
        UserError: they are not what the spec was made with, or do not fit.
    """
    for group, source in spec.adapter.init_from.items():
        path = Path(source.trial) / WEIGHTS
        if not path.is_file() or digest_of(path) != source.weights_sha256:
            raise UserError(f"{path}: not the weights that this trial was planned with; start the experiment again")
        pairs = _pairs(model, group, source)
        parameters = dict(model.named_parameters())
        with safe_open(path, framework="pt") as file:
            for name, theirs in pairs.items():
                parameters[name].data.copy_(file.get_tensor(theirs))
        if _frozen(model.adapters):
            _check_frozen(spec, model, group, source)


def _check_frozen(spec: TrialSpec, model: ContextModel, group: str, source: InitSource) -> None:
    """See that what was drawn and not trained is the same in both trials, by drawing it again.

    Raises:
        UserError: it is not.
    """
    record = finished(Path(source.trial))
    adapter: AdapterChoice = read_section(AdapterChoice, Path(source.trial), record.spec["adapter"])
    router = Router(adapter.grouping)
    methods = dict.fromkeys(router.groups, method_of(adapter))
    theirs = Adapters(model.language_model, methods, router, record.seed, roles=spec.backbone.roles).state_dict()
    ours = model.adapters.state_dict()
    for name in _frozen(model.adapters):
        parts = name.split(".")
        if not {f"group_{other}" for other in model.router.groups if other != group} & set(parts):
            there = ".".join(f"group_{source.group}" if part == f"group_{group}" else part for part in parts)
            if there not in theirs or not torch.equal(ours[name], theirs[there]):
                raise UserError(f"{source.trial}: {adapter.method} drew other frozen weights there ({name})")
