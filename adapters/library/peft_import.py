"""A checkpoint of the PEFT library → an adapter group: ``adapter_config.json`` and ``adapter_model.safetensors``.

A PEFT checkpoint does not know contexts: it becomes the group of all contexts, or of one.
https://huggingface.co/docs/peft/developer_guides/checkpoint (0.21). Exporting is in peft_export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.library.adapted_model import AdaptedModel, adapt
from adapters.library.peft_forms import CONFIG, FORMS, PREFIX, TENSORS, Form
from adapters.methods.peft_bridge import ADAPTER, BOOKKEEPING, PeftChange, config_keys, make_config, peft_library
from adapters.placement.roles import find_targets
from harness.core.errors import UserError, did_you_mean

# Keys of a checkpoint's config that select layers, or that have no effect once the weights are loaded.
_WHICH_LAYERS = {"target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform", "layers_pattern"}
_INITIAL = {"init_lora_weights", "init_ia3_weights", "init_weights", "projection_prng_key"}
_HARMLESS = {"inference_mode", "megatron_core", "runtime_config", "qalora_group_size"}
_KEEPS_BASE = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # values of init_lora_weights that do not change the base's weights


def import_peft(
    model: Any,
    folder: str | Path,
    contexts: Sequence[str] = ("image", "text"),
    context: str | None = None,
    roles: Mapping[str, Any] | None = None,
) -> AdaptedModel:
    """Load a checkpoint of the peft library onto a base model, as our LoRA (rsLoRA too), DoRA, IA3 or VeRA.

    Args:
        model: the base model, as for ``harness.adapt``.
        folder: contains ``adapter_config.json`` and ``adapter_model.safetensors``.
        contexts: as for ``harness.adapt``.
        context: the context whose tokens the adapter acts on; None: all contexts.
        roles: as for ``harness.adapt``.

    Raises:
        UserError: missing or damaged files, a method or option without equivalent here, layers that are not whole
            roles, tensors that are missing, unexpected or of another shape (all named), or peft is not installed. The
            model is then unchanged.
    """
    folder = Path(folder)
    if context is not None and context not in contexts:
        raise UserError(f"context: found {context!r}; {did_you_mean(context, contexts)}")
    if isinstance(model, AdaptedModel):
        raise UserError("model: found an adapted model; allowed: a base model without adapters")
    raw = _read_json(folder / CONFIG)
    form, options = _read_options(raw, str(folder / CONFIG))
    tensors = _read_tensors(folder / TENSORS)
    # What PEFT itself would build for this model: its layers, and the shapes of its tensors.
    built = PeftChange(model, make_config({"peft_type": form.peft_type, **options, **form.any_scale}), seed=0)
    _check_tensors(built, tensors, str(folder / TENSORS))
    where = _where(model, built, form, tensors, roles)
    grouping = "agnostic" if context is None else {c: c if c == context else None for c in contexts}
    spec = {"method": form.method, **form.our_options(options), "where": where}
    # The checkpoint may store VeRA's projections only as the seed from which PEFT draws them.
    made = {name: getattr(built.tuner, name)[ADAPTER] for name in form.shared}
    shared = {name: tensors.get(f"base_model.{name}", tensor) for name, tensor in made.items()}
    adapted = adapt(model, spec, contexts, grouping, roles=roles)
    (group,) = adapted.router.groups
    with torch.no_grad():
        for _, target, delta in adapted.adapters.deltas_of(group):
            form.fill(target, delta, _of_layer(target.path, tensors))
        for name, tensor in shared.items():
            adapted.adapters.shared_of(group).get_buffer(name).copy_(tensor)
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
        raise UserError(f"{path}: cannot be read: {error}; allowed: safetensors, not adapter_model.bin") from error


def _read_options(raw: Mapping[str, Any], where: str) -> tuple[Form, dict[str, Any]]:
    """Our equivalent of the checkpoint's method, and PEFT's options for it. Any other option in use is an error."""
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
        # An unknown key (of another PEFT version) with an empty value is a feature that is switched off.
        off = value == getattr(default, key) if key in known else not value
        if not (off or key in allowed | _HARMLESS | BOOKKEEPING):
            raise UserError(
                f"{where}: {key}: found {value!r}; allowed: PEFT's default, because there is no equivalent here"
            )
    if options.get("init_lora_weights", True) not in _KEEPS_BASE:
        found = options["init_lora_weights"]
        raise UserError(
            f"{where}: init_lora_weights: found {found!r}, which changes the base's weights; convert it first"
        )
    if not options.get("target_modules"):
        raise UserError(f"{where}: target_modules: found none; it must name the layers that the checkpoint adapts")
    return form, options


def _check_tensors(built: PeftChange, tensors: Mapping[str, Tensor], where: str) -> None:
    expected = {f"base_model.{_saved_name(name)}": x.shape for name, x in built.tuner.state_dict().items()}
    for key, layer in built.layers.items():
        path = PREFIX + key.replace("/", ".")
        expected |= {f"{path}.{_saved_name(name)}": x.shape for name, x in layer.state_dict().items()}
    for what, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - expected.keys()),
    ):
        if names:
            raise UserError(f"{where}: {what}: {', '.join(sorted(names))}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} must have shape {tuple(shape)}; found {tuple(tensors[name].shape)}")


def _saved_name(name: str) -> str:
    """Name in PEFT's file of a parameter of PEFT's layer."""
    name = name.replace(f".{ADAPTER}", "")
    return name.removesuffix(".weight") if name.startswith("lora_magnitude_vector") else name


def _where(
    model: nn.Module, built: PeftChange, form: Form, tensors: Mapping[str, Tensor], roles: Mapping[str, Any] | None
) -> list[str]:
    """The roles whose layers are those that the checkpoint adapts."""
    layers = {key.replace("/", "."): layer for key, layer in built.layers.items()}
    find_targets(model, form.roles, roles)  # raises for an unknown architecture
    paths = {role: _paths(model, role, roles) for role in sorted(form.roles)}
    where = [role for role, found in paths.items() if found and found <= layers.keys()]
    others = layers.keys() - {path for role in where for path in paths[role]}
    if others:
        raise UserError(
            f"import_peft: {form.method}: allowed: all layers of some of the roles {', '.join(sorted(form.roles))}; "
            f"found in addition to {', '.join(where) or 'none'}: {', '.join(sorted(others))}"
        )
    targets = find_targets(model, frozenset(where), roles)
    for path, layer in layers.items():
        form.check_layer([t for t in targets if t.path == path], layer, _of_layer(path, tensors))
    return where


def _paths(model: nn.Module, role: str, roles: Mapping[str, Any] | None) -> set[str]:
    try:
        return {target.path for target in find_targets(model, frozenset({role}), roles)}
    except UserError:  # the model lacks this role
        return set()


def _of_layer(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{PREFIX}{path}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
