"""Writes what the report shows of input files: previews of the few test examples that are drawn for it.

They are in the run folder, ``previews/<digest>.png``, named by the file's content and the modality, so that the trials
of a grid share them. Results know no modality, so a report could not make them itself.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from harness.core.files import atomic
from harness.core.registry import Plugin
from harness.core.samples import PREVIEWS, draw_ids
from harness.model.features import Features
from harness.model.inputs import Inputs
from tasks.base import Example, Modality, Preview, PreviewKind

_log = logging.getLogger(__name__)

SUFFIXES: Mapping[PreviewKind, str] = {"png": ".png", "wav": ".wav", "text": ".txt"}


def write_previews(
    run: Path, examples: Sequence[Example], features: Features, plugins: Mapping[str, Plugin]
) -> dict[str, list[str | None]]:
    """Write the previews of the drawn examples that are not there yet; one that fails is logged, and left out.

    Args:
        run: the run folder.
        examples: of the test split.
        features: with the modality of each context.
        plugins: of the modalities, by name.

    Returns:
        Example id → for each of its inputs the name of its preview in ``previews``, or None.
    """
    inputs = Inputs(run)
    members = list(dict.fromkeys(example.member for example in examples if example.member))
    by_id = {example.id: example for example in examples}
    found: dict[str, list[str | None]] = {}
    for example_id in draw_ids(list(by_id), members):
        names: list[str | None] = []
        for context, value in by_id[example_id].inputs:
            try:
                name = None
                if isinstance(value, Path):
                    modality = features.task.modalities[context]
                    key = f"{plugins[modality].id} {inputs.digest(value)}"
                    name = _name(run / PREVIEWS, features.modalities[modality], value, key)
            except Exception as error:  # a plugin's preview must not cost a trial that has its result
                _log.warning("no preview of %s: %s: %s", value, type(error).__name__, error)
                name = None
            names.append(name)
        if any(names):
            found[example_id] = names
    return found


def _name(folder: Path, modality: Modality, path: Path, key: str) -> str | None:
    """The name of a file's preview, which is written if it is not there; None: the modality has none."""
    if type(modality).preview is Modality.preview:
        return None
    stem = hashlib.sha256(key.encode()).hexdigest()[:24]
    for kind in get_args(PreviewKind):
        if (folder / f"{stem}{SUFFIXES[kind]}").is_file():
            return f"{stem}{SUFFIXES[kind]}"
    preview: Preview | None = modality.preview(modality.load(path))
    if preview is None:
        return None
    name = f"{stem}{SUFFIXES[preview.kind]}"
    with atomic(folder / name) as partial:
        partial.write_bytes(preview.content)
    return name
