"""Resolves and checks ``init_from``, which initialises adapter groups from finished trials; does not import torch.

``init_from: {image: runs/coco/trials/ab12cd34ef56, text: {trial: …, group: all}}`` (see ``harness/model/assembly.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.files import digest_of
from harness.core.paths import locate
from harness.core.record import TrialRecord, read_record
from harness.core.validation import check
from harness.experiment.sections import AdapterChoice, GroupChoice, InitSource, Section

WEIGHTS = "best.safetensors"  # in the folder of a trial
Shapes = dict[str, tuple[int, ...]]


class _Entry(Section):
    """An entry of ``init_from`` in its long form."""

    trial: str  # folder
    group: str | None = None  # of that trial; default: the same name


def find_init_sources(given: Any, choice: AdapterChoice, where: Cursor, start: Path) -> dict[str, InitSource]:
    """Resolve ``init_from`` of an adapter to a mapping group → source.

    Args:
        given: its value in the experiment.
        choice: the adapter, with all other options resolved.
        where: location of ``init_from``.
        start: the folder that relative paths start from.

    Raises:
        UserError: a group or trial does not exist, or the trial was trained with another method or other options.
    """
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where}: found {given!r}; allowed: group → folder of a finished trial")
    groups = choice.group_names
    if not groups:
        raise UserError(f"{where}: {choice.method} has no adapter groups to initialise; leave 'init_from' out")
    sources = {}
    for group, entry in given.items():
        here = where / group
        if group not in groups:
            raise UserError(f"{here}: no such adapter group; {did_you_mean(str(group), groups)}")
        if not isinstance(entry, str | Mapping):
            raise UserError(f"{here}: found {entry!r}; allowed: a trial's folder, or trial and group")
        wanted = check(_Entry, {"trial": entry} if isinstance(entry, str) else entry, here)
        contexts = [context for context, own in choice.grouping.items() if own == group]
        try:
            folder = locate(wanted.trial, start, explain=True).absolute()
            sources[group] = _source(folder, wanted.group or group, choice.of_group(group), contexts)
        except (UserError, ValueError) as error:
            raise UserError(f"{here}: {error}") from None
    return sources


def _source(folder: Path, group: str, choice: GroupChoice, contexts: list[str]) -> InitSource:
    record = finished_record(folder)
    adapter: AdapterChoice = read_section(AdapterChoice, folder, record.spec["adapter"])
    if group not in adapter.group_names:
        near = did_you_mean(group, adapter.group_names)
        raise UserError(f"{folder}: that trial has no adapter group {group!r}; {near}")
    theirs = adapter.of_group(group)
    if theirs.method != choice.method:
        raise UserError(f"{folder}: trained with method {theirs.method}; allowed: {choice.method}")
    check_equal(folder, _options(choice), _options(theirs))
    weights = folder / WEIGHTS
    projected = {name.split(".")[1] for name in shapes_of(weights) if name.startswith("projectors.")}
    return InitSource(
        trial=str(folder),
        group=group,
        weights_sha256=digest_of(weights),
        projectors=tuple(context for context in contexts if context in projected),
    )


def _options(choice: GroupChoice) -> dict[str, Any]:
    return {**choice.config, "plugin": " ".join(plugin.id for plugin in choice.plugins)}


def finished_record(folder: Path) -> TrialRecord:
    """Read the record of a finished trial.

    Raises:
        UserError: the folder has no readable record, or the trial has not finished or lacks its weights.
    """
    if not (folder / "record.json").is_file():
        trials = sorted(str(path.parent) for path in folder.glob("trials/*/record.json"))
        hint = f"this run has {', '.join(trials)}" if trials else "allowed: <run folder>/trials/<trial id>"
        raise UserError(f"{folder}: contains no trial record; {hint}")
    try:
        record = read_record(folder / "record.json")
    except ValueError as error:
        raise UserError(str(error)) from None
    if record.status != "finished":
        raise UserError(f"{folder}: the trial is {record.status} ({record.reason}); allowed: a finished trial")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder / WEIGHTS}: no such file; the trained weights of the trial are required")
    return record


def read_section(section: type[Any], folder: Path, content: Any) -> Any:
    """Validate a section of the spec in a record.

    Raises:
        UserError: it was written by an incompatible version of the harness.
    """
    try:
        return section.model_validate_json(json.dumps(content))
    except ValidationError as error:
        text = f"the spec was written by an incompatible version of the harness: {error}"
        raise UserError(f"{folder / 'record.json'}: {text}") from None


def check_equal(folder: Path, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Check that this trial's options equal those of the source trial.

    Raises:
        UserError: some differ; the message lists them with both values.
    """
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if differing:
        found = ", ".join(f"{key}={there.get(key)!r} (here {here.get(key)!r})" for key in differing)
        raise UserError(f"{folder}: trained with different options: {found}; they must be equal")


def shapes_of(path: Path) -> Shapes:
    """The shapes of the tensors in a safetensors file, by name.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
