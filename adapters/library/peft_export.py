"""One adapter group → a checkpoint of the PEFT library: ``adapter_config.json`` and ``adapter_model.safetensors``.

A PEFT checkpoint does not know contexts: loaded with ``peft.PeftModel.from_pretrained``, it applies to every token what
the exported group applies to its own tokens. https://huggingface.co/docs/peft/developer_guides/checkpoint (0.21)

Importing is in peft_io, which also needs ``adapt``; this module needs only what ``AdaptedModel`` is made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters.attach import Adapters
from adapters.library.peft_forms import FORMS, PREFIX, TENSORS
from adapters.library.spec import Spec
from adapters.methods.peft_bridge import peft_library
from harness.core.errors import UserError, did_you_mean
from harness.core.files import atomic


def export_group(base_model: Any, adapters: Adapters, spec: Spec, folder: Path, group: str | None) -> None:
    """Write one group's adapter; ``AdaptedModel.export_peft`` is the public form.

    Args:
        base_model: the language model that the adapters are attached to.
        adapters: all groups' parameters.
        spec: what was attached.
        folder: for both files; created if missing.
        group: a group, or a context, whose group is meant; None: the one that all contexts share.

    Raises:
        UserError: contexts do not share a group and none is named, the method has no equivalent in PEFT, it acts on a
            part of a fused layer, the folder cannot be written, or peft is not installed.
    """
    peft, name = peft_library(), _group(spec, group)
    method = spec.by_group[name].method
    form = FORMS.get(type(method))
    if form is None:
        allowed = ", ".join(form.method for form in FORMS.values())
        raise UserError(f"export_peft: {method.label()} has no equivalent in the peft library; allowed: {allowed}")
    own = list(adapters.deltas_of(name))
    of_path: dict[str, dict[str, Tensor]] = {}
    for _, target, delta in own:
        so_far = of_path.setdefault(target.path, {})
        so_far |= form.saved(target, delta, so_far)
    tensors = {f"{PREFIX}{path}.{key}": tensor for path, saved in of_path.items() for key, tensor in saved.items()}
    for buffer in form.shared:
        tensors[f"base_model.{buffer}"] = adapters.shared_of(name).get_buffer(buffer)
    targets = [target for _, target, _ in own]
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[form.peft_type](
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(base_model.config, "_name_or_path", None) or None,
        inference_mode=True,
        fan_in_fan_out=all(isinstance(target.layer, Conv1D) for target in targets),
        **form.which_layers(_short_names(base_model, set(of_path)), targets),
        **form.peft_options(method.config, spec.shared not in (None, name)),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        with atomic(folder / TENSORS) as partial:
            save_file(ready, partial, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error


def _group(spec: Spec, wanted: str | None) -> str:
    groups, own = list(spec.by_group), set(spec.grouping.values())
    if spec.ungrouped:
        label = spec.ungrouped.method.label()
        raise UserError(f"export_peft: {label} has no adapter group that the peft library could load")
    if wanted is None:
        if len(own) == 1 and groups[-1] in own:
            return groups[-1]
        raise UserError(
            f"export_peft: a PEFT checkpoint applies to all tokens, but the contexts differ: {spec.named_groups}; "
            f"name one: group={groups[-1 if spec.shared else 0]!r}"
        )
    found = wanted if wanted in groups else spec.grouping.get(wanted)
    if found is None:
        raise UserError(f"export_peft: no group or context {wanted!r} with an adapter; {did_you_mean(wanted, groups)}")
    return found


def _short_names(model: nn.Module, paths: set[str]) -> dict[str, str]:
    """Path → its shortest suffix for which the suffixes match these layers and no others."""
    everything = [path for path, _ in model.named_modules()]
    for length in range(1, max(path.count(".") for path in paths) + 2):
        names = {path: ".".join(path.split(".")[-length:]) for path in paths}
        ends = set(names.values())
        if {path for path in everything if any(f".{path}".endswith(f".{end}") for end in ends)} == paths:
            break
    return names
