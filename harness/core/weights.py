"""Fingerprints of pretrained models: which weights a name stood for when a trial was planned.

Of a folder it is the SHA-256 of the files that ``from_pretrained`` reads (weights, configurations, tokenizer,
preprocessors, code); of a hub id, the commit. The names of models do not change when their weights do, so fingerprints
enter a trial's id, its record, and what must be equal for two trials to be comparable.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from harness.core import hub
from harness.core.errors import UserError
from harness.core.files import digests_of

COMMIT = "commit:"
FOLDER = "sha256:"
_READ = {
    ".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf",  # weights
    ".json", ".jinja", ".py",  # configurations, chat templates, code
    ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".codes", ".vocab", ".tokenizer",  # vocabularies
}  # fmt: skip
# What training leaves next to a model: read by no from_pretrained.
_NOT_READ = re.compile(
    r"training\.json|training_args\.(bin|json)|trainer_state\.json|(optimizer|scheduler|rng_state.*|scaler)\.(pt|pth|bin)"
    r"|all_results\.json|(train|eval)_results\.json|(readme|license|requirements)\.txt",
    re.IGNORECASE,
)


def models_of(backbone: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """The name and revision of every pretrained model in a spec's section ``backbone``, by its key in that section.

    Built-in encoders without weights and those of plugins are left out: they are versioned with their plugin.
    """
    models = {"language_model": (backbone["language_model"], backbone.get("revision"))} if backbone else {}
    plugins = backbone.get("encoder_plugins", {})
    models |= {
        f"encoders.{modality}": (name, None)
        for modality, name in backbone.get("encoders", {}).items()
        if modality not in plugins
    }
    return {
        key: (name, revision)
        for key, (name, revision) in models.items()
        if not hub.is_builtin(name) or Path(hub.resolve(name)).is_dir()
    }


def fingerprint(name: str, revision: str | None = None) -> str | None:
    """``sha256:…`` of a folder, ``commit:…`` of a hub id; None if neither the folder nor the commit is known.

    The local cache of the hub takes precedence over the hub, so that a model stays what it was when it was downloaded.

    Raises:
        UserError: a file of the folder cannot be read.
    """
    model, own = hub.split_revision(name)
    if not hub.looks_like_folder(model):
        commit = _commit(model, own or revision or "main")
        return commit and f"{COMMIT}{commit}"
    folder = Path(hub.resolve(model))
    if not folder.is_dir():
        return None
    try:
        return FOLDER + _digest_of_folder(folder.resolve())
    except OSError as error:
        raise UserError(f"{name!r}: cannot be read: {error}") from error


def model_key(key: str, name: str, revision: str | None) -> str:
    """Key of a model in ``Plan.fingerprints``: ``language_model facebook/opt-125m@27dcfa7``."""
    return f"{key} {name}@{revision}" if revision else f"{key} {name}"


def short(fingerprint: str | None) -> str:
    """The first twelve characters of the digest or commit, for display."""
    return fingerprint.partition(":")[2][:12] if fingerprint else "unknown"


def pinned(name: str, fingerprint: str | None) -> str:
    """The name with the commit of its fingerprint, if it is a hub id: ``facebook/opt-125m@27dcfa7…``."""
    if fingerprint is None or not fingerprint.startswith(COMMIT):
        return name
    return f"{hub.split_revision(name)[0]}@{fingerprint.removeprefix(COMMIT)}"


def check_unchanged(backbone: Mapping[str, Any], fingerprints: Mapping[str, str | None]) -> None:
    """Check that the folders of models still hold what they held when the trial was planned.

    Raises:
        UserError: one has changed; the message names its key.
    """
    for key, (name, revision) in models_of(backbone).items():
        planned = fingerprints.get(key)
        if planned and planned.startswith(FOLDER) and (found := fingerprint(name, revision)) != planned:
            raise UserError(
                f"backbone.{key}: {name!r}: the weights or their tokenizer have changed since this trial was planned "
                f"({short(planned)}, now {short(found)}); run the experiment again"
            )


def _digest_of_folder(folder: Path) -> str:
    files = sorted(
        path
        for path in (*folder.iterdir(), *_in_subfolders(folder))
        if path.suffix.lower() in _READ and not _NOT_READ.fullmatch(path.name) and path.is_file()
    )
    total = hashlib.sha256()
    for path, digest in zip(files, digests_of(files), strict=True):
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _in_subfolders(folder: Path) -> set[Path]:
    """Chat templates, and shards that an index names; not checkpoints of a training."""
    found = set((folder / "additional_chat_templates").glob("*"))
    for index in folder.glob("*.index.json"):
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # from_pretrained tells what is wrong with it
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            found |= {folder / shard for shard in shards if "/" in shard and not {"/", ".."} & {*Path(shard).parts}}
    return found


@cache
def _commit(model: str, revision: str) -> str | None:
    """The commit of a hub id's branch or tag, from the hub's local cache, else from the hub; None if neither has it."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    ref = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model") / "refs" / revision
    with suppress(OSError):
        return ref.read_text(encoding="utf-8").strip()
    return hub.commit_on_hub(model, revision)
