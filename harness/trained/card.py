"""The model card of an exported model: what it is, how it scored, where it comes from, how it is used."""

from __future__ import annotations

from typing import Any

import yaml

from harness.core.naming import method_options
from harness.trained.folder import Description


def card(found: Description, merged: bool, peft: bool) -> str:
    """Markdown with the metadata that the hub reads (https://huggingface.co/docs/hub/model-cards).

    Args:
        found: of the folder.
        merged: whether the folder has the merged language model.
        peft: whether it has a checkpoint of the peft library.
    """
    spec = found.spec
    backbone, task = spec["backbone"], spec["task"]["name"]
    name = f"{found.label} {found.grouping}".rstrip()
    parts = [
        "---\n" + yaml.safe_dump(_metadata(backbone), sort_keys=False).rstrip() + "\n---",
        f"# {name} on {task}",
        f"Trained by trial `{found.trial_id}` of the experiment `{found.experiment}` with the Context-PEFT harness "
        "(arXiv 2312.08900).",
        _table(_facts(found)),
        "## Scores\n\nOf this trial and seed; methods are compared by the leaderboard of the experiment.\n\n"
        + _scores(found.metrics),
        "## Use\n\n```\nharness predict . FILE...\n```\n\n```python\nimport harness\n\ntrained = "
        'harness.load_trained(".")\ntrained.predict([' + str(_example(spec)) + "])\n```",
        _files(merged, peft, whole=bool(spec["backbone"].get("model"))),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(backbone: dict[str, Any]) -> dict[str, Any]:
    models = [backbone["language_model"], *backbone["encoders"].values()]
    published = [model.partition("@")[0] for model in models if not model.startswith(("builtin/", "/", "."))]
    return {"library_name": "context-peft-harness", "tags": ["context-peft", "peft"]} | (
        {"base_model": published} if published else {}
    )


def _facts(found: Description) -> dict[str, str]:
    spec = found.spec
    rows = {
        "language model": spec["backbone"]["language_model"],
        "quantization": spec["backbone"].get("quantization", ""),
        **{f"encoder of {modality}": _encoder(spec["backbone"], modality) for modality in spec["backbone"]["encoders"]},
        "contexts": ", ".join(spec["task"]["contexts"]),
        "groups": ", ".join(f"{c}: {_groups(spec['adapter'], g)}" for c, g in spec["adapter"]["grouping"].items()),
        "options": ", ".join(f"{key}={value}" for key, value in method_options(spec["adapter"]).items()),
        "training examples": "" if found.examples is None else f"{found.examples:,}",
        "epochs": str(spec["budget"]["epochs"]),
        "seed": str(spec["seed"]),
        "trainable parameters": "" if found.parameters is None else f"{found.parameters.trainable:,}",
        "trained at": found.started_at,
        "revision of the harness": found.git_revision or "",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(found.versions.items())),
    }
    return {name: value for name, value in rows.items() if value}


def _encoder(backbone: dict[str, Any], modality: str) -> str:
    """The name, and what the experiment said beside it."""
    options = backbone.get("encoder_options", {}).get(modality, {})
    return ", ".join([backbone["encoders"][modality], *(f"{key}={value}" for key, value in options.items())])


def _groups(adapter: dict[str, Any], own: str | None) -> str:
    """``image``, or ``shared + image`` where a group acts on all tokens."""
    return " + ".join(group for group in (adapter.get("shared_group"), own) if group) or "no adapter"


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _scores(metrics: dict[str, dict[str, float]]) -> str:
    lines = [
        f"| {split} | {name} | {value:.5g} |" for split, own in metrics.items() for name, value in sorted(own.items())
    ]
    return "\n".join(["| split | metric | value |", "|---|---|---|", *lines])


def _example(spec: dict[str, Any]) -> dict[str, str]:
    *inputs, answer = spec["task"]["contexts"]
    return dict.fromkeys(inputs or [answer], "...")


def _files(merged: bool, peft: bool, whole: bool) -> str:
    lines = [
        "- `trained.json`, `weights.safetensors`: for `harness predict`; the models above are needed as well.",
    ]
    if not whole:
        lines.append("- `adapter/`: the adapters alone, for `harness.load_adapter(language_model, folder)`.")
    if peft:
        lines.append("- `peft/`: the same as a checkpoint of the peft library.")
    if merged:
        lines.append("- `merged/`: the language model with the adapters in its weights, for `from_pretrained`.")
    return "## Files\n\n" + "\n".join(lines)
