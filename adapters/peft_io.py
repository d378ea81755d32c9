"""Adapters to and from checkpoints of the PEFT library: ``adapter_config.json`` and ``adapter_model.safetensors``.

A PEFT checkpoint does not know of contexts: it is one group's adapter. What is exported computes, loaded with
``peft.PeftModel.from_pretrained``, for every token what the group computes for its own. What is imported becomes the
group of all contexts, or of one. https://huggingface.co/docs/peft/developer_guides/checkpoint (0.21)

Shapes: I and O input and output features of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.adapted import AdaptedModel, adapt
from adapters.attach import AdaptedLayer
from adapters.base import Change
from adapters.peft_bridge import ADAPTER, BOOKKEEPING, PeftChange, config_keys, make_config, peft_library
from adapters.peft_forms import FORMS, Form
from adapters.roles import Target, find_targets
from harness.errors import UserError, did_you_mean

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's model holds its tuner, and that the base
# Keys of a checkpoint's config that say which layers, or nothing that matters once the weights are there.
_WHICH_LAYERS = {"target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"}
_INITIAL = {"init_lora_weights", "init_ia3_weights", "init_weights", "projection_prng_key"}
_HARMLESS = {"inference_mode", "megatron_core", "runtime_config", "qalora_group_size"}
_KEEPS_BASE = (True, False, "gaussian", "orthogonal")  # values of init_lora_weights that leave the base's weights alone


# ── Export


def export_peft(adapted: AdaptedModel, folder: str | Path, group: str | None = None) -> None:
    """Write one group's adapter as a checkpoint of the peft library. LoRA, DoRA, IA3 and VeRA have such a form.

    Args:
        adapted: the model.
        folder: for ``adapter_config.json`` and ``adapter_model.safetensors``; made if missing.
        group: a group, or a context, whose group is meant; None: the one that all contexts share. PEFT applies it to
            every token.

    Raises:
        UserError: contexts do not share a group and none is named, the method has no form in PEFT, it acts on a part of
            a fused layer, the folder cannot be written, or peft is not installed.
    """
    peft, folder = peft_library(), Path(folder)
    name = _group(adapted, group)
    method = adapted.spec.by_group[name].method
    form = FORMS.get(type(method))
    if form is None:
        allowed = ", ".join(form.method for form in FORMS.values())
        raise UserError(f"export_peft: {method.label()} has no form in the peft library; allowed: {allowed}")
    layers = [(target, delta) for _, target, delta in _layers(adapted, name)]
    of_path: dict[str, dict[str, Tensor]] = {}
    for target, delta in layers:
        so_far = of_path.setdefault(target.path, {})
        so_far |= form.saved(target, delta, so_far)
    tensors = {f"{_PREFIX}{path}.{key}": tensor for path, own in of_path.items() for key, tensor in own.items()}
    for buffer in form.shared:
        tensors[f"base_model.{buffer}"] = _shared(adapted, name).get_buffer(buffer)
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[form.peft_type](
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(adapted.base_model.config, "_name_or_path", None) or None,
        inference_mode=True,
        fan_in_fan_out=all(isinstance(target.layer, Conv1D) for target, _ in layers),
        **form.which_layers(_short_names(adapted.base_model, set(of_path)), [target for target, _ in layers]),
        **form.peft_options(method.config),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(ready, folder / TENSORS, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error


def _group(adapted: AdaptedModel, wanted: str | None) -> str:
    grouping, groups = adapted.spec.grouping, list(adapted.spec.by_group)
    if adapted.spec.ungrouped:
        label = adapted.spec.ungrouped.method.label()
        raise UserError(f"export_peft: {label} has no adapter group that could be a checkpoint of the peft library")
    if wanted is None:
        if set(grouping.values()) == {groups[0]}:
            return groups[0]
        differ = ", ".join(f"{c}: {g or 'no adapter'}" for c, g in grouping.items())
        raise UserError(
            f"export_peft: a PEFT checkpoint acts on all tokens alike, but contexts differ: {differ}; "
            f"name one: group={groups[0]!r}"
        )
    found = wanted if wanted in groups else grouping.get(wanted)
    if found is None:
        raise UserError(f"export_peft: no group or context {wanted!r} with an adapter; {did_you_mean(wanted, groups)}")
    return found


def _layers(adapted: AdaptedModel, group: str) -> Iterator[tuple[str, Target, nn.Module]]:
    """The layers that the group's method adapts: the method's name there, the layer, the group's parameters for it."""
    for layer in adapted.adapters.layers.values():
        assert isinstance(layer, AdaptedLayer)  # noqa: S101 - for the type checker
        for name, change in layer.changes.items():
            assert isinstance(change, Change)  # noqa: S101
            if group in change.groups:
                yield name, layer.target, change.delta(group)


def _shared(adapted: AdaptedModel, group: str) -> nn.Module:
    """What the group's layers share. Methods of one kind with other options have names of their own."""
    return adapted.adapters.shared.get_submodule(next(name for name, _, _ in _layers(adapted, group)))


def _short_names(model: nn.Module, paths: set[str]) -> dict[str, str]:
    """Path → its end, the shortest for which the ends mean these layers and no others."""
    everything = [path for path, _ in model.named_modules()]
    for length in range(1, max(path.count(".") for path in paths) + 2):
        names = {path: ".".join(path.split(".")[-length:]) for path in paths}
        ends = set(names.values())
        if {path for path in everything if any(f".{path}".endswith(f".{end}") for end in ends)} == paths:
            break
    return names


# ── Import


def import_peft(
    model: Any,
    folder: str | Path,
    contexts: Sequence[str] = ("image", "text"),
    context: str | None = None,
    roles: Mapping[str, Any] | None = None,
) -> AdaptedModel:
    """Put a checkpoint of the peft library onto a base model, as our own LoRA (rsLoRA too), DoRA, IA3 or VeRA.

    Args:
        model: the base, as for ``harness.adapt``.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        contexts: as for ``harness.adapt``.
        context: the one whose tokens the adapter acts on; None: all of them.
        roles: as for ``harness.adapt``.

    Raises:
        UserError: files missing or damaged, a method or an option that has no form here, layers that are not whole
            roles, tensors that are missing, left over or of another shape (all named), or peft is not installed. The
            model is then as it was.
    """
    folder = Path(folder)
    if context is not None and context not in contexts:
        raise UserError(f"context: found {context!r}; {did_you_mean(context, contexts)}")
    if isinstance(model, AdaptedModel):
        raise UserError("model: found an adapted model; allowed: a base model, without adapters")
    raw = _read_json(folder / CONFIG)
    form, options = _read_options(raw, str(folder / CONFIG))
    tensors = _read_tensors(folder / TENSORS)
    # What PEFT itself would put onto this model: which layers, and which tensors of which shapes.
    built = PeftChange(model, make_config({"peft_type": form.peft_type, **options}), seed=0)
    _check_tensors(built, tensors, str(folder / TENSORS))
    where = _where(model, built, form, tensors, roles)
    grouping = "agnostic" if context is None else {c: c if c == context else None for c in contexts}
    spec = {"method": form.method, **form.our_options(options), "where": where}
    # VeRA's projections may be in the checkpoint only as a seed, from which PEFT made them.
    made = {name: getattr(built.tuner, name)[ADAPTER] for name in form.shared}
    shared = {name: tensors.get(f"base_model.{name}", tensor) for name, tensor in made.items()}
    adapted = adapt(model, spec, contexts, grouping, roles=roles)
    (group,) = adapted.router.groups
    with torch.no_grad():
        for _, target, delta in _layers(adapted, group):
            form.fill(target, delta, _of_layer(target.path, tensors))
        for name, tensor in shared.items():
            _shared(adapted, group).get_buffer(name).copy_(tensor)
    return adapted


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: found {type(raw).__name__}; allowed: a mapping")
    return raw


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}; only safetensors are, not adapter_model.bin") from error


def _read_options(raw: Mapping[str, Any], where: str) -> tuple[Form, dict[str, Any]]:
    """Which of our methods it is, and PEFT's options that matter for it; any other that is in use is an error."""
    kind = str(raw.get("peft_type"))
    forms = [f for f in FORMS.values() if f.peft_type == kind]
    if not forms:
        kinds = {form.peft_type for form in FORMS.values()}
        raise UserError(f"{where}: peft_type: found {kind!r}; {did_you_mean(kind, kinds)}")
    (form,) = [f for f in forms if "use_dora" not in f.fixed or f.fixed["use_dora"] == bool(raw.get("use_dora"))]
    config_class = peft_library().PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known, default = config_keys(config_class), config_class()
    allowed = {*form.options.values(), *form.fixed, *_WHICH_LAYERS, *_INITIAL, "fan_in_fan_out", "use_rslora"}
    options = {key: getattr(default, key) for key in form.options.values()}
    for key, value in raw.items():
        if key in allowed & known:
            options[key] = value
        # An unknown key (of another version of PEFT) without a value is a feature that is off.
        off = value == getattr(default, key) if key in known else not value
        if not (off or key in allowed | _HARMLESS | BOOKKEEPING):
            raise UserError(
                f"{where}: {key}: found {value!r}; allowed: nothing but PEFT's default, as it has no form here"
            )
    if options.get("init_lora_weights", True) not in _KEEPS_BASE:
        found = options["init_lora_weights"]
        raise UserError(
            f"{where}: init_lora_weights: found {found!r}, which changes the base's weights; convert it first"
        )
    if not options.get("target_modules"):
        raise UserError(f"{where}: target_modules: found none; it says which layers the checkpoint adapts")
    return form, options


def _check_tensors(built: PeftChange, tensors: Mapping[str, Tensor], where: str) -> None:
    expected = {f"base_model.{_saved_name(name)}": x.shape for name, x in built.tuner.state_dict().items()}
    for key, layer in built.layers.items():
        path = _PREFIX + key.replace("/", ".")
        expected |= {f"{path}.{_saved_name(name)}": x.shape for name, x in layer.state_dict().items()}
    for what, names in (("missing", expected.keys() - tensors.keys()), ("left over", tensors.keys() - expected.keys())):
        if names:
            raise UserError(f"{where}: {what}: {', '.join(sorted(names))}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} must have shape {tuple(shape)}; found {tuple(tensors[name].shape)}")


def _saved_name(name: str) -> str:
    """Of a parameter of PEFT's layer in PEFT's file."""
    name = name.replace(f".{ADAPTER}", "")
    return name.removesuffix(".weight") if name.startswith("lora_magnitude_vector") else name


def _where(
    model: nn.Module, built: PeftChange, form: Form, tensors: Mapping[str, Tensor], roles: Mapping[str, Any] | None
) -> list[str]:
    """The roles whose layers are the checkpoint's."""
    layers = {key.replace("/", "."): layer for key, layer in built.layers.items()}
    find_targets(model, form.roles, roles)  # raises for an unknown architecture
    paths = {role: _paths(model, role, roles) for role in sorted(form.roles)}
    where = [role for role, found in paths.items() if found and found <= layers.keys()]
    others = layers.keys() - {path for role in where for path in paths[role]}
    if others:
        raise UserError(
            f"import_peft: {form.method}: the adapted layers must be all layers of some of the roles "
            f"{', '.join(sorted(form.roles))}; found besides {', '.join(where) or 'none'}: {', '.join(sorted(others))}"
        )
    targets = find_targets(model, frozenset(where), roles)
    for path, layer in layers.items():
        form.check_layer([t for t in targets if t.path == path], layer, _of_layer(path, tensors))
    return where


def _paths(model: nn.Module, role: str, roles: Mapping[str, Any] | None) -> set[str]:
    try:
        return {target.path for target in find_targets(model, frozenset({role}), roles)}
    except UserError:  # the model lacks it
        return set()


def _of_layer(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{_PREFIX}{path}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
