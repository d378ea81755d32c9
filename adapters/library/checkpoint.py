"""Adapters on disk: ``context_peft.json`` says what they are, ``context_peft.safetensors`` holds the numbers.

The JSON also knows the base that the adapters were made for, by the shapes and a few values of its frozen weights, so
that another base is an error. The values may differ by what rounding to bf16 or fp16 does: the same base in another
dtype is the same base. Of a weight that is stored quantised only the presence is checked.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adapters.library.spec import Spec, resolve
from adapters.placement.offload import tensor_of
from adapters.registry import ADAPTERS, Choice
from harness.core.contexts import STACKED
from harness.core.errors import UserError, did_you_mean
from harness.core.files import atomic, write_atomically

JSON_NAME, TENSORS_NAME = "context_peft.json", "context_peft.safetensors"
FORMAT_VERSION = 2
_LIBRARIES = ("context-peft-harness", "torch", "transformers")
_SAMPLE_SIZE = 8  # values of each weight
# Rounding to bf16 (8 significant bits) moves a value by at most 2^-8 of it; the absolute part is fp16's smallest step.
_RTOL, _ATOL = 0.005, 1e-7


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SavedPlugin(_Schema):
    """Which plugin a method came from. It is compared with what is registered; a file cannot name code to load."""

    name: str
    distribution: str
    result_version: int | str  # of a plugin from a file: a digest of the file
    version: str | None  # of the distribution


class SavedMethod(_Schema):
    """A method and its options, defaults included."""

    method: str  # registry name, such as "lora" or "lora+bitfit"
    plugins: tuple[SavedPlugin, ...]  # the method, or those that it combines
    options: dict[str, Any]


class SavedParameter(_Schema):
    """What is known of one of the base's parameters."""

    shape: tuple[int, ...] | None  # None: quantised
    sample: tuple[float, ...] | None  # None: quantised, or trained and so no mark of the base


class SavedBase(_Schema):
    """What is known of the base model: the layers that the adapters act on; of a method without layers, all of them."""

    model_type: str
    layers: dict[str, dict[str, SavedParameter]]  # layer's path → its parameters


class Saved(_Schema):
    """The content of ``context_peft.json``."""

    format_version: int
    save_id: str  # the same in both files
    contexts: tuple[str, ...]  # in the order of their ids
    grouping: dict[str, str | None]
    groups: dict[str, SavedMethod]
    ungrouped: SavedMethod | None
    roles: dict[str, Any] | None
    seed: int
    contexts_from: dict[int, str] | None = None
    shared: str | None = None  # the group that acts on every token beside the token's own; left out if there is none
    versions: dict[str, str]
    base: SavedBase


def describe_base(language_model: nn.Module, paths: Iterable[str]) -> SavedBase:
    """What will tell this base from another.

    Args:
        language_model: the base.
        paths: of the layers that adapters act on; none: all layers.
    """
    parameters = dict(language_model.named_parameters())
    wanted = list(paths) or list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    layers = {
        path: {
            name.removeprefix(f"{path}."): _describe(p, _values(language_model, name))
            for name, p in parameters.items()
            if name.startswith(f"{path}.")
        }
        for path in wanted
    }
    return SavedBase(model_type=_model_type(language_model), layers=layers)


def _values(language_model: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    values: Tensor = tensor_of(language_model.get_submodule(path), own)
    return values


def _describe(parameter: nn.Parameter, values: Tensor) -> SavedParameter:
    if not parameter.is_floating_point():
        return SavedParameter(shape=None, sample=None)
    shape = tuple(parameter.shape)
    if parameter.requires_grad:
        return SavedParameter(shape=shape, sample=None)
    flat_N = values.detach().flatten()
    sample = flat_N[:: max(1, flat_N.numel() // _SAMPLE_SIZE)][:_SAMPLE_SIZE].double().tolist()
    return SavedParameter(shape=shape, sample=tuple(sample))


def check_base(saved: SavedBase, language_model: nn.Module, where: str) -> None:
    """Compare a model with the base that adapters were made for.

    Raises:
        UserError: another model type, or a layer that is missing or different (named).
    """
    found_type = _model_type(language_model)
    if found_type != saved.model_type:
        raise UserError(f"{where}: saved on a {saved.model_type} model; found a {found_type} model")
    found = describe_base(language_model, saved.layers).layers
    for path, parameters in saved.layers.items():
        if sorted(found[path]) != sorted(parameters):
            raise UserError(
                f"{where}: saved on another base model: layer {path} had the parameters {sorted(parameters)}; "
                f"found {sorted(found[path])}"
            )
        for name, wanted in parameters.items():
            _compare(wanted, found[path][name], f"{where}: saved on another base model: {path}.{name}")


def _compare(wanted: SavedParameter, found: SavedParameter, where: str) -> None:
    if wanted.shape is None or found.shape is None:
        return
    if wanted.shape != found.shape:
        raise UserError(f"{where} had shape {wanted.shape}; found {found.shape}")
    for a, b in zip(wanted.sample or (), found.sample or (), strict=False):
        if not abs(a - b) <= _ATOL + _RTOL * max(abs(a), abs(b)):
            raise UserError(f"{where} held the value {a:.6g}; found {b:.6g} in its place")


def write(folder: Path, spec: Spec, base: SavedBase, tensors: Mapping[str, Tensor]) -> None:
    """Write both files, each complete or not at all; the JSON last.

    Raises:
        UserError: the folder cannot be written.
    """
    saved = Saved(
        format_version=FORMAT_VERSION,
        save_id=uuid.uuid4().hex,
        contexts=tuple(spec.grouping),
        grouping=dict(spec.grouping),
        groups={group: _saved_method(choice) for group, choice in spec.by_group.items()},
        ungrouped=_saved_method(spec.ungrouped) if spec.ungrouped else None,
        roles=None if spec.roles is None else dict(spec.roles),
        seed=spec.seed,
        contexts_from=None if spec.contexts_from is None else dict(spec.contexts_from),
        shared=spec.shared,
        versions={name: version(name) for name in _LIBRARIES},
        base=base,
    )
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic(folder / TENSORS_NAME) as partial:
            save_file(on_cpu, partial, metadata={"save_id": saved.save_id})
        unset = {"shared"} if saved.shared is None else set()
        write_atomically(folder / JSON_NAME, saved.model_dump_json(indent=1, exclude=unset) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: adapters cannot be saved: {error}") from error


def _saved_method(choice: Choice) -> SavedMethod:
    options = choice.method.config.model_dump(mode="json")
    fields = set(SavedPlugin.model_fields)
    plugins = tuple(SavedPlugin(**plugin.model_dump(include=fields)) for plugin in choice.plugins)
    return SavedMethod(method=choice.name, plugins=plugins, options=options)


def read(folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    """Both files of a folder.

    Raises:
        UserError: a file is missing, damaged, of another format version, or the two do not belong together.
    """
    path, tensors_path = folder / JSON_NAME, folder / TENSORS_NAME
    for needed in (path, tensors_path):
        if not needed.is_file():
            raise UserError(f"{folder}: no {needed.name} in it; an adapter that was saved has one")
    saved = _read_json(path)
    try:
        with safe_open(tensors_path, framework="pt") as file:
            save_id = (file.metadata() or {}).get("save_id")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{tensors_path}: cannot be read: {error}") from error
    if save_id != saved.save_id:
        raise UserError(f"{folder}: {JSON_NAME} and {TENSORS_NAME} are not from one save; save the adapter again")
    return saved, tensors


def _read_json(path: Path) -> Saved:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    found = content.get("format_version") if isinstance(content, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{path}: format_version: found {found!r}; this harness reads {FORMAT_VERSION}")
    try:
        return Saved.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key_path = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key_path}: {first['msg'][:1].lower() + first['msg'][1:]}") from None


def spec_of(saved: Saved, where: str) -> Spec:
    """What was asked for when the adapters were made.

    Only what is registered is ever imported: a file cannot name code to run.

    Raises:
        UserError: a method is not installed, is another class by now, or refuses the options.
    """
    for method in [saved.ungrouped] if saved.ungrouped else saved.groups.values():
        if method is not None:
            _check_registered(method, where)
    if saved.shared is not None and saved.shared not in saved.groups:
        raise UserError(f"{where}: shared: found {saved.shared!r}; {did_you_mean(saved.shared, saved.groups)}")
    if saved.ungrouped:
        spec: dict[str, Any] = {"method": saved.ungrouped.method, **saved.ungrouped.options}
    elif saved.shared is not None:
        one = saved.groups[saved.shared]
        spec = {"method": one.method, **one.options}
    else:
        spec = {group: {"method": one.method, **one.options} for group, one in saved.groups.items()}
    grouping: Any = "agnostic" if saved.ungrouped else STACKED if saved.shared is not None else saved.grouping
    try:
        ordered = {c: grouping[c] for c in saved.contexts} if isinstance(grouping, dict) else grouping
        return resolve(spec, saved.contexts, ordered, saved.seed, saved.roles, saved.contexts_from)
    except KeyError as error:
        raise UserError(f"{where}: grouping: context {error} is missing") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_registered(saved: SavedMethod, where: str) -> None:
    registered = ADAPTERS.entries()
    for plugin in saved.plugins:
        kept = f"adapter method {plugin.name!r} of {plugin.distribution} {plugin.version or ''}".rstrip()
        if plugin.name not in registered:
            raise UserError(f"{where}: {kept} is not installed; {did_you_mean(plugin.name, registered)}")
        found = ADAPTERS.plugin(plugin.name, where)
        if (found.distribution, found.result_version) != (plugin.distribution, plugin.result_version):
            raise UserError(
                f"{where}: saved with {kept}, result version {plugin.result_version}; registered now: "
                f"{found.distribution} {found.version or ''}, result version {found.result_version}, which may compute "
                "something else; install the version it was saved with"
            )


def _model_type(language_model: nn.Module) -> str:
    config = getattr(language_model, "config", None)
    return str(getattr(config, "model_type", type(language_model).__name__))
