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
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by label and grouping: the different options
    place: dict[int, tuple[tuple[str, str], int]] = {}  # id of an adapter → its family and its options' index there
    for adapter in {id(spec["adapter"]): spec["adapter"] for spec in specs.values()}.values():
        options, family = _adapter_options(adapter), (adapter["label"], adapter["grouping_name"])
        known = families.setdefault(family, [])
        if options not in known:
            known.append(options)
        place[id(adapter)] = family, known.index(options)
    extras = {family: _differing(known) for family, known in families.items()}

    def label(adapter: Mapping[str, Any]) -> str:
        family, index = place[id(adapter)]
        return f"{adapter['label']} {extras[family][index]}".rstrip()

    return {trial_id: label(spec["adapter"]) for trial_id, spec in specs.items()}


def _differing(known: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each of the options, those in which they are not all alike."""
    keys = dict.fromkeys(key for own in known for key in own)
    varying = {key for key in keys if any(own.get(key) != known[0].get(key) for own in known)}
    return [" ".join(f"{key}={value}" for key, value in own.items() if key in varying) for own in known]


def _adapter_options(adapter: Mapping[str, Any]) -> dict[str, Any]:
    sources = adapter.get("init_from") or {}
    named = ", ".join(f"{group}={PurePath(o['trial']).name}:{o['group']}" for group, o in sources.items())
    plugins = " ".join(identity(adapter.get("plugins", ())))
    extras = {"init_from": named, "plugin": plugins}
    return method_options(adapter) | {name: value for name, value in extras.items() if value}


def method_options(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an adapter's method: ``rank``; where groups differ, those of each: ``image.rank``."""
    groups = adapter.get("groups") or {}
    of_groups = {f"{group}.{key}": value for group, own in groups.items() for key, value in own["config"].items()}
    return {**adapter.get("config", {}), **of_groups}


def settings(specs: Mapping[str, Spec], without: Sequence[str] = ()) -> dict[str, str]:
    """Settings by trial id: what varies besides adapter, learning rate and seed, such as ``examples=512 epochs=8``.

    Args:
        specs: by trial id.
        without: dotted keys to leave out, such as ``budget.examples``: trials of one sweep then share a setting.
    """
    # Trials of a plan share their sections, so most of them are alike in all.
    alike = {trial_id: tuple(map(id, _conditional(spec).values())) for trial_id, spec in specs.items()}
    kinds = {alike[trial_id]: spec for trial_id, spec in specs.items()}
    flat = {kind: dict(flatten(conditions(spec))) for kind, spec in kinds.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    keys = dict.fromkeys(key for key in keys if key not in without and not _PLUGIN_KEY.match(key))
    varying = [key for key in keys if _varies(key, list(flat.values()))]
    names = {
        kind: " ".join(_setting(key, values[key]) for key in varying if key in values) for kind, values in flat.items()
    }
    return {trial_id: names[kind] for trial_id, kind in alike.items()}


def _varies(key: str, trials: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key has several values; for the fingerprint of a model, several in trials that name the same model.

    A key of a section that is left out where it is unset has two if some trials have it and others do not.
    """
    if _LEFT_OUT_UNSET.fullmatch(key) and not all(key in values for values in trials):
        return True
    model = key.removeprefix(FINGERPRINTS)
    named = (f"backbone.{model}", "backbone.revision") if model != key else ()
    groups: dict[str, set[str]] = {}
    for values in trials:
        if key in values:
            groups.setdefault(repr([values.get(name) for name in named]), set()).add(repr(values[key]))
    return any(len(found) > 1 for found in groups.values())


# Keys of sections whose fields are the same for all trials; options of a task are those of that task.
_LEFT_OUT_UNSET = re.compile(r"(backbone|budget|optimizer)\.\w+|backbone\.encoder_options\.\w+\.\w+")


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
        for section, content in _conditional(spec).items()
    }


def _conditional(spec: Spec) -> dict[str, Mapping[str, Any]]:
    return {name: content for name, content in spec.items() if name != "adapter" and isinstance(content, Mapping)}


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested mappings to pairs of dotted key and value."""
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs


def metric_name(member: str, name: str) -> str:
    """``cider``, or ``coco_captions/cider`` in a mixture."""
    return f"{member}/{name}" if member else name
