"""Names of trials: labels distinguish adapters; settings contain what else varies besides seed and learning rate.

Works on specs as records store them (``TrialSpec`` as JSON), so that a plan and a report over several runs use the same
names. No name contains the learning rate: trials that differ only in it are candidates of one search.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from harness.core.registry import identity
from harness.core.weights import short

Spec = Mapping[str, Any]
FINGERPRINTS = "fingerprints."  # dotted keys of the models' fingerprints
_PLUGIN_KEY = re.compile(r"task\.(plugin$|modalities\.|metrics\.)")  # follow from the task's name and options


def labels(specs: Mapping[str, Spec]) -> dict[str, str]:
    """Labels by trial id: the method's label, plus the options in which entries of one label and grouping differ."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    extras: dict[tuple[str, str], list[str]] = {}
    place: dict[str, int] = {}  # index of a trial's options within its family
    for trial_id, spec in specs.items():
        options = _adapter_options(spec["adapter"])
        known = families.setdefault(_family(spec), [])
        if options not in known:
            known.append(options)
        place[trial_id] = known.index(options)
    for family, known in families.items():
        differing = [[key for key in own if any(other.get(key) != own[key] for other in known)] for own in known]
        extras[family] = [
            " ".join(f"{key}={own[key]}" for key in keys) for own, keys in zip(known, differing, strict=True)
        ]
    return {
        trial_id: f"{spec['adapter']['label']} {extras[_family(spec)][place[trial_id]]}".rstrip()
        for trial_id, spec in specs.items()
    }


def _family(spec: Spec) -> tuple[str, str]:
    return spec["adapter"]["label"], spec["adapter"]["grouping_name"]


def _adapter_options(adapter: Mapping[str, Any]) -> dict[str, Any]:
    sources = adapter.get("init_from") or {}
    named = ", ".join(f"{group}={PurePath(o['trial']).name}:{o['group']}" for group, o in sources.items())
    plugins = " ".join(identity(adapter.get("plugins", ())))
    return {**adapter["config"], **({"init_from": named} if named else {}), **({"plugin": plugins} if plugins else {})}


def settings(specs: Mapping[str, Spec], without: Sequence[str] = ()) -> dict[str, str]:
    """Settings by trial id: what varies besides adapter, learning rate and seed, such as ``examples=512 epochs=8``.

    Args:
        specs: by trial id.
        without: dotted keys to leave out, such as ``budget.examples``: trials of one sweep then share a setting.
    """
    flat = {trial_id: dict(flatten(conditions(spec))) for trial_id, spec in specs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    keys = dict.fromkeys(key for key in keys if key not in without and not _PLUGIN_KEY.match(key))
    varying = [key for key in keys if _varies(key, list(flat.values()))]
    return {
        trial_id: " ".join(_setting(key, values[key]) for key in varying if key in values)
        for trial_id, values in flat.items()
    }


def _varies(key: str, trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key has several values; for the fingerprint of a model, several in trials that name the same model."""
    model = key.removeprefix(FINGERPRINTS)
    named = (f"backbone.{model}", "backbone.revision") if model != key else ()
    groups: dict[str, set[str]] = {}
    for values in trials:
        if key in values:
            groups.setdefault(repr([values.get(name) for name in named]), set()).add(repr(values[key]))
    return any(len(found) > 1 for found in groups.values())


def _setting(key: str, value: Any) -> str:
    if key.startswith(FINGERPRINTS):
        return f"{key.rpartition('.')[2]}_weights={short(value)}"
    return f"{key.rpartition('.')[2]}={value}"


# Keys in which trials of one setting may differ: the ranking metric, the margin of equivalence, the batch size of
# evaluation, and the learning rate, which is searched.
_LEFT_OUT = {
    "eval": {"primary_metric", "equivalence_margin", "per_device_eval_batch_size"},
    "optimizer": {"learning_rate"},
}


def conditions(spec: Spec) -> dict[str, dict[str, Any]]:
    """What must be equal for two adapters to be comparable, by section: task, backbone, its weights, budget, …

    Plugins are replaced by their ids, which do not depend on the location of the class.
    """
    return {
        section: {key: identity(value) for key, value in content.items() if key not in _LEFT_OUT.get(section, ())}
        for section, content in spec.items()
        if section != "adapter" and isinstance(content, Mapping)
    }


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested mappings to pairs of dotted key and value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
