"""Quantised language models: 4 or 8 bits a weight when a checkpoint is read, or a GGUF file.

``nf4`` and ``int8`` are bitsandbytes', of the layers that transformers would quantise (all linear ones of the blocks,
not the output layer). A ``gguf`` file is unpacked when it is read: its weights have its precision, and the memory of
``backbone.dtype``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapters.placement.layers import features_of
from harness.core import hub
from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model.packed import Int8Linear, NF4Linear

GGUF = "gguf"
PACKED = ("nf4", "int8")
_NEEDS = {"nf4": ("accelerate", "bitsandbytes"), "int8": ("accelerate", "bitsandbytes"), GGUF: ("accelerate", "gguf")}
_EXTRA = "pip install 'context-peft-harness[quantization]'"


def check_libraries(form: str) -> None:
    """Check that what a form of quantisation needs is installed.

    Raises:
        UserError: it is not.
    """
    if missing := [name for name in _NEEDS[form] if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"backbone.quantization: {form} needs {' and '.join(missing)}, which is not installed: {_EXTRA}"
        )


def check_checkpoint(backbone: Backbone) -> None:
    """Check that a checkpoint has the form that is asked for: a GGUF file, or weights that are not quantised.

    Raises:
        UserError: it has not.
    """
    if backbone.quantization == GGUF:
        gguf_file(backbone)
        return
    name, place = backbone.language_model, Path(hub.resolve(backbone.pinned_language_model))
    if place.is_dir() and not (place / "config.json").exists() and (files := sorted(place.glob("*.gguf"))):
        raise UserError(
            f"backbone.language_model: {name!r}: found {files[0].name} and no config.json; allowed with it: "
            "backbone.quantization: gguf"
        )


def check_not_quantised(backbone: Backbone) -> None:
    """Check that a checkpoint is not quantised itself: its layers would be another library's.

    Raises:
        UserError: it is.
    """
    if backbone.quantization == GGUF:
        return
    given = getattr(
        hub.load_config(backbone.pinned_language_model, backbone.trust_remote_code), "quantization_config", None
    )
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    raise UserError(
        f"backbone.language_model: {backbone.language_model!r}: its checkpoint is already quantised "
        f"(quantization_config: {getattr(method, 'value', method)}), in layers that adapters and parameter counts were "
        "not tested on; allowed: the checkpoint that it was made from, with backbone.quantization: nf4 or int8"
    )


def loading_options(backbone: Backbone, whole: Sequence[str] | None = None) -> dict[str, Any]:
    """What ``from_pretrained`` of the model needs, besides its dtype.

    Args:
        backbone: that is loaded.
        whole: paths of modules that are not quantised; None: the output layer, as transformers finds it.

    Raises:
        UserError: a library is missing, or not exactly one GGUF file is there.
    """
    if backbone.quantization is None:
        return {}
    check_libraries(backbone.quantization)
    if backbone.quantization == GGUF:
        from transformers import GgufConfig

        return {"gguf_file": gguf_file(backbone), "quantization_config": GgufConfig(dequantize=True)}
    # Where the harness reads all models; a trial moves its own.
    return {"quantization_config": _config(backbone.quantization, whole), "device_map": {"": "cpu"}}


def _config(form: str, whole: Sequence[str] | None) -> Any:
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {} if whole is None else {"llm_int8_skip_modules": [*whole]}
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **options)


def outside(part: nn.Module, model: nn.Module) -> list[str]:
    """The paths of the modules of a model beside one of them: a tower, a connector, an output layer."""
    names = next(name for name, module in model.named_modules() if module is part).split(".")
    found = []
    for depth, own in enumerate(names):
        holder = ".".join(names[:depth])
        children = (name for name, _ in model.get_submodule(holder).named_children())
        found += [f"{holder}.{name}".lstrip(".") for name in children if name != own]
    return found


def gguf_file(backbone: Backbone) -> str | None:
    """The name of the GGUF file in the folder or repository of the language model; None: it is not asked for.

    Raises:
        UserError: there is none, or there are several.
    """
    if backbone.quantization != GGUF:
        return None
    name = backbone.pinned_language_model
    found = sorted(file for file in _files(name) if file.lower().endswith(".gguf"))
    if len(found) != 1:
        files = "no .gguf file" if not found else f"{len(found)} .gguf files: {', '.join(found[:6])}"
        hint = "a folder with the one to use" if found else "a folder or hub id with one, or another quantization"
        raise UserError(f"backbone.language_model: {backbone.language_model!r}: found {files}; allowed: {hint}")
    return found[0]


def _files(name: str) -> list[str]:
    """The files of a folder, or of a repository as the hub's local cache has it, else as the hub does."""
    place = hub.resolve(name)
    if hub.looks_like_folder(name):
        return [path.name for path in Path(place).iterdir()] if Path(place).is_dir() else []
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(place, revision=hub.revision_of(name), local_files_only=True)
    except LocalEntryNotFoundError:
        try:
            return list(list_repo_files(place, revision=hub.revision_of(name)))
        except Exception as error:  # the types depend on the HTTP library that huggingface_hub uses
            raise UserError(hub.load_error(name, error)) from error
    return [str(path.relative_to(snapshot)) for path in Path(snapshot).rglob("*.gguf")]


def check_frozen(form: str, label: str, language_model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Check that a method trains none of a quantised language model's own weights.

    Args:
        form: of the quantisation.
        label: of the method.
        language_model: that is quantised.
        trained: the base's parameters that the method trains, those of a tower too.

    Raises:
        UserError: it does.
    """
    if not {*map(id, trained)}.isdisjoint(map(id, language_model.parameters())):
        raise UserError(
            f"backbone.quantization: {label} trains the language model's own weights, which {form} has rounded: steps "
            "are smaller than its rounding, and what would be trained is no longer that form; allowed: adapters or "
            "none (the projector alone, LLaVA's first stage), or no quantization"
        )


def pack(model: Any) -> Any:
    """A model with bitsandbytes' layers, as ``from_pretrained`` makes it, with ours in their place."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            model.set_submodule(name, NF4Linear.of(layer))
        elif isinstance(layer, Linear8bitLt):
            model.set_submodule(name, Int8Linear.of(layer))
    return _unmarked(model)


def pack_empty(model: Any, form: str, whole: Sequence[str] | None = None) -> Any:
    """A model without values, with the layers that it has when it is loaded in a form; ``whole`` as for loading it.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    check_libraries(form)
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kind = NF4Linear if form == "nf4" else Int8Linear
    left = HfQuantizer.get_modules_to_not_convert(model, whole and [*whole], model._keep_in_fp32_modules)
    for name, layer in list(model.named_modules()):
        if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and should_convert_module(name, left):
            packed = kind.empty(*features_of(layer), layer.bias, layer.weight.device)
            model.set_submodule(name, packed)
    return _unmarked(model)


def _unmarked(model: Any) -> Any:
    """The model without what lets transformers take it for one with layers of its own, which are not moved or cast."""
    for mark in ("hf_quantizer", "hf_device_map", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    return model
