"""``export_trial``: what a finished trial has trained, as a folder that can be loaded, shared and served."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from adapters.library.adapted_model import AdaptedModel
from adapters.library.spec import resolve
from harness.core.contexts import STACKED
from harness.core.errors import UserError
from harness.core.files import atomic, digest_of, write_atomically
from harness.experiment import init_sources
from harness.experiment.init_sources import finished_record, read_section
from harness.experiment.plan import TrialSpec
from harness.model.backbones import LanguageModel, load_language_model
from harness.trained.card import card
from harness.trained.folder import CARD, DESCRIPTION, FORMAT_VERSION, WEIGHTS, Description

ADAPTER, PEFT, MERGED = "adapter", "peft", "merged"


def export_trial(
    trial: str | Path,
    folder: str | Path,
    *,
    peft: bool = False,
    merge: bool = False,
    push_to_hub: str | None = None,
) -> Path:
    """Write what a finished trial has trained into a folder, for ``harness.load_trained`` and ``harness predict``.

    The folder has ``trained.json`` and ``weights.safetensors`` (adapters and projectors), a model card, and in
    ``adapter/`` the adapters alone, which ``harness.load_adapter`` loads onto the bare language model.

    Args:
        trial: folder of a finished trial, RUN/trials/ID.
        folder: to write; it must not exist or be empty.
        peft: also write ``peft/``, a checkpoint of the peft library; all contexts must share one group.
        merge: also write ``merged/``, the language model with the adapters in its weights, and its tokenizer; all
            contexts must share one group.
        push_to_hub: a repository of the hub, ``user/name``, to upload the folder to; it is created if missing.

    Returns:
        The folder.

    Raises:
        UserError: the trial has not finished, the folder is in use, or the method cannot be written in that form;
            nothing is left of the folder then.
    """
    trial, folder = Path(trial), Path(folder)
    record = finished_record(trial)
    spec: TrialSpec = read_section(TrialSpec, trial, record.spec)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; allowed: a new folder")
    weights = trial / init_sources.WEIGHTS
    found = Description(
        format_version=FORMAT_VERSION,
        trial_id=record.trial_id,
        experiment=record.experiment,
        label=spec.adapter.label,
        grouping=spec.adapter.grouping_name,
        spec=_portable(spec),
        weights_sha256=digest_of(weights),
        metrics=record.metrics,
        parameters=record.parameters,
        examples=record.data.examples if record.data else None,
        versions=record.versions,
        git_revision=record.git_revision,
        started_at=record.started_at,
    )
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with atomic(folder / WEIGHTS) as partial:
            shutil.copyfile(weights, partial)
        _write_adapter(spec, weights, folder, peft, merge)
        write_atomically(folder / CARD, card(found, merged=merge, peft=peft))
        write_atomically(folder / DESCRIPTION, found.model_dump_json(indent=1) + "\n")  # last: the folder is whole
    except BaseException:
        for path in list(folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if new:
            folder.rmdir()
        raise
    if push_to_hub:
        _push(folder, push_to_hub)
    return folder


def _portable(spec: TrialSpec) -> dict[str, Any]:
    """The spec without what a prediction does not need, and with models located wherever the folder is read."""
    task = spec.task.model_copy(update={"metrics": {}})
    adapter = spec.adapter.model_copy(update={"init_from": {}})
    backbone = spec.backbone.model_copy(
        update={
            "model": spec.pinned_backbone.model,
            "language_model": spec.pinned_backbone.language_model,
            "encoders": _located(spec),
        }
    )
    return spec.model_copy(update={"task": task, "adapter": adapter, "backbone": backbone}).model_dump(mode="json")


def _located(spec: TrialSpec) -> dict[str, str]:
    """The encoders, with absolute paths of folders; a commit of the hub is in the fingerprints."""
    pinned = spec.pinned_backbone.encoders
    return {m: pinned[m] if pinned[m].startswith("/") else name for m, name in spec.backbone.encoders.items()}


def _write_adapter(spec: TrialSpec, weights: Path, folder: Path, peft: bool, merge: bool) -> None:
    """Write the adapters alone, on the bare language model; of a vision-language model there is none to load them onto.

    Raises:
        UserError: the method cannot be written in that form.
    """
    if spec.backbone.model is not None:
        if peft or merge:
            raise UserError(
                f"{spec.adapter.label}: trained inside {spec.backbone.model!r}, a vision-language model, whose layers "
                "have other names outside a trial; allowed: an export without peft and merge, for harness predict"
            )
        return
    tensors = {
        name.replace("language_model.", "base_model.", 1) if name.startswith("language_model.") else name: tensor
        for name, tensor in safetensors.torch.load_file(weights).items()
        if not name.startswith("projectors.")
    }
    if not tensors:  # a projector alone was trained
        if peft or merge:
            raise UserError(f"{spec.adapter.label}: it has no adapter, so there is nothing to write as peft or merged")
        return
    language_model = load_language_model(spec.pinned_backbone)
    adapted = _adapted(spec, language_model)
    unexpected = adapted.load_state_dict(tensors, strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"{weights}: not the weights of this adapter: {', '.join(unexpected[:3])}")
    adapted.eval()
    adapted.save(folder / ADAPTER)
    if peft:
        adapted.export_peft(folder / PEFT)
    if merge:
        adapted.merge().save_pretrained(folder / MERGED)
        language_model.tokenizer.save_pretrained(folder / MERGED)


def _adapted(spec: TrialSpec, language_model: LanguageModel) -> AdaptedModel:
    choice = spec.adapter
    grouping: Any = dict(choice.grouping) if choice.group_names else "agnostic"
    wanted = resolve(
        {group: {"method": own.method, **own.config} for group, own in choice.groups.items()}
        or {"method": choice.method, **choice.config},
        list(choice.grouping),
        STACKED if choice.shared_group else grouping,
        spec.seed,
        spec.backbone.roles,
    )
    return AdaptedModel(language_model.model, wanted)


def _push(folder: Path, repository: str) -> None:
    """Upload the folder to the hub.

    Raises:
        UserError: the hub cannot be reached, or does not accept it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"push_to_hub: {repository!r}: {reason}; the folder {folder} is whole") from error
