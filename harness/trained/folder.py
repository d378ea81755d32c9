"""The folder of an exported model: ``trained.json`` says what it is, ``weights.safetensors`` holds what was trained.

The language model and the encoders are not copied: they are named, with their fingerprints. A folder may come from
anybody, so it names no code: its plugins are looked up among those that are registered here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.registry import ADAPTERS
from harness.core.errors import UserError
from harness.core.files import digest_of
from harness.core.record import Parameters
from harness.core.registry import Plugin, Registry, add_file
from harness.core.schema import Schema, read_strictly
from harness.experiment.plan import TrialSpec
from tasks.registry import ENCODERS, METRICS, MODALITIES, TASKS

DESCRIPTION, WEIGHTS, CARD = "trained.json", "weights.safetensors", "README.md"
FORMAT_VERSION = 1
# Key of the spec → what its plugins are; all others are tasks.
_REGISTRIES: dict[str, Registry[Any]] = {"modalities": MODALITIES, "encoder_plugins": ENCODERS, "adapter": ADAPTERS}


class Description(Schema):
    """The content of ``trained.json``."""

    format_version: int
    trial_id: str
    experiment: str
    label: str
    grouping: str
    spec: dict[str, Any]  # the resolved TrialSpec, without metrics
    weights_sha256: str
    metrics: dict[str, dict[str, float]]  # split → metric → value, as in the trial's record
    parameters: Parameters | None
    examples: int | None  # that it was trained on
    versions: dict[str, str]
    git_revision: str | None
    started_at: str


def read_description(folder: Path) -> Description:
    """Read and check an exported folder.

    Raises:
        UserError: it is none, of another format, or its weights are not those that were exported.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        hint = "it is a trial's folder: `harness export` makes one" if (folder / "record.json").is_file() else None
        raise UserError(f"{path}: no such file; {hint or 'allowed: a folder that `harness export` wrote'}")
    try:
        found = read_strictly(Description, path, "an exported model")
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    if found.format_version != FORMAT_VERSION:
        raise UserError(f"{path}: format_version: found {found.format_version}; allowed: {FORMAT_VERSION}")
    weights = folder / WEIGHTS
    if not weights.is_file() or digest_of(weights) != found.weights_sha256:
        raise UserError(f"{weights}: not the weights that were exported (SHA-256 {found.weights_sha256[:12]}…)")
    return found


def spec_of(found: Description, folder: Path, plugins: Sequence[str | Path] = ()) -> TrialSpec:
    """The spec of the trial, with the plugins that are registered here.

    Args:
        found: of the folder.
        folder: for messages.
        plugins: Python files that define plugins, which are executed.

    Raises:
        UserError: a plugin is not registered here, or is another one; or the spec is of an incompatible version.
    """
    for file in plugins:
        add_file(Path(file), "plugins", (TASKS, MODALITIES, ENCODERS, METRICS, ADAPTERS))
    here = _with_registered(found.spec, TASKS, f"{folder / DESCRIPTION}: spec")
    try:
        return TrialSpec.model_validate_json(json.dumps(here))
    except ValueError as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / DESCRIPTION}: written by an incompatible version of the harness: {first}") from None


def _with_registered(content: Any, registry: Registry[Any], where: str) -> Any:
    """The content with each plugin as it is registered here."""
    if isinstance(content, Mapping):
        if content.keys() == Plugin.model_fields.keys():
            return _registered(Plugin.model_validate(content), registry, where).model_dump(mode="json")
        return {
            key: _with_registered(value, _REGISTRIES.get(key, registry), f"{where}.{key}")
            for key, value in content.items()
        }
    if isinstance(content, list):
        return [_with_registered(value, registry, where) for value in content]
    return content


def _registered(saved: Plugin, registry: Registry[Any], where: str) -> Plugin:
    found = registry.plugin(saved.name, where)
    if found.id != saved.id:
        raise UserError(
            f"{where}: trained with the {registry.kind} {saved.id} (version {saved.version or 'unknown'}); here it is "
            f"{found.id}; install that version, or give its file as a plugin"
        )
    return found
