"""Locate pretrained models: built in (``builtin/tiny-llama``), in a local folder, or on the Hugging Face hub.

Used for language models and for the encoders of modalities.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from harness.core.errors import UserError, did_you_mean

PRETRAINED = Path(__file__).parent.parent / "pretrained"
HUB_TIMEOUT_S = 10.0
# Configurations of hub models, as published there, so that `harness plan` can count their parameters offline.
KNOWN_CONFIGS = Path(__file__).parent.parent / "known_configs.json"


class HubUnreachableError(UserError):
    """A model is not available locally, and the hub could not be reached."""


def is_builtin(name: str) -> bool:
    """Whether the name has the form ``builtin/…``."""
    return name.startswith("builtin/")


def builtin_names() -> list[str]:
    """Names of the built-in models that have weights."""
    return sorted(f"builtin/{path.parent.name}" for path in PRETRAINED.glob("*/config.json"))


def looks_like_folder(name: str) -> bool:
    """Whether the name is a path rather than a hub id."""
    return name.startswith(("/", "./", "../", "~", "builtin/")) or Path(name).is_dir()


def resolve(name: str) -> str:
    """The argument for ``from_pretrained``: the folder of a built-in or local model, or the hub id itself."""
    if is_builtin(name):
        return str(PRETRAINED / name.removeprefix("builtin/"))
    return str(Path(name).expanduser()) if looks_like_folder(name) else split_revision(name)[0]


def split_revision(name: str) -> tuple[str, str | None]:
    """Split ``facebook/opt-125m@27dcfa7`` into hub id and revision; a folder has none."""
    if looks_like_folder(name) or "@" not in name:
        return name, None
    model, _, revision = name.partition("@")
    return model, revision or None


def revision_of(name: str) -> str:
    """The argument ``revision`` for ``from_pretrained``; ignored for a folder."""
    return split_revision(name)[1] or "main"


_unreachable: list[str] = []  # ids that the hub did not answer about: without a network each would take the timeout


def commit_on_hub(model: str, revision: str) -> str | None:
    """The commit of a branch or tag, from the hub; None if it does not answer or does not have it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if _unreachable:
        return None
    try:
        return HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except HfHubHTTPError:  # it answered: no such model or revision, or no access
        return None
    except Exception:  # the types depend on the HTTP library that huggingface_hub uses
        _unreachable.append(model)
        return None


def load_error(name: str, error: Exception) -> str:
    """The error message when a model could not be loaded: the reason, and the nearest model that could be."""
    if below := _models_below(name):
        return f"backbone {name!r} has no config.json, but folders in it have: {did_you_mean(name, below)}"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    hint = did_you_mean(name, [*builtin_names(), *_timm_names(name)])
    return f"backbone {name!r} could not be loaded from a folder or from the hub ({reason}); {hint}"


def _models_below(name: str) -> list[str]:
    """The folders of models in a folder that is none itself."""
    folder = Path(resolve(name))
    if not looks_like_folder(name) or not folder.is_dir() or (folder / "config.json").exists():
        return []
    return sorted(f"{name.rstrip('/')}/{path.parent.name}" for path in folder.glob("*/config.json"))


def _timm_names(name: str) -> list[str]:
    """The pretrained models that the installed timm knows, if the name is one of timm's."""
    if not name.startswith("timm/"):
        return []
    try:
        import timm
    except Exception:  # not installed, or its torchvision was built for another torch
        return []
    return [f"timm/{known}" for known in timm.list_models(pretrained=True)]


@cache
def load_config(name: str, trust_remote_code: bool = False, gguf_file: str | None = None) -> Any:
    """Load the ``transformers`` configuration of a model, without weights; of a GGUF file that which it describes.

    The hub's local cache and ``KNOWN_CONFIGS`` take precedence over the network.

    Raises:
        UserError: there is no built-in model, folder or reachable hub id of this name, or it needs a library that
            cannot be imported.
    """
    from transformers import AutoConfig

    if looks_like_folder(name) and not Path(resolve(name)).is_dir():
        raise UserError(f"{name!r}: no such folder; a backbone is a folder, a hub id, or {', '.join(builtin_names())}")
    known = json.loads(KNOWN_CONFIGS.read_text(encoding="utf-8"))
    place, revision = resolve(name), revision_of(name)
    trust = {"trust_remote_code": trust_remote_code, "revision": revision}
    trust |= {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(place, **trust, local_files_only=True)
    except ImportError as error:
        raise UserError(_lacks_library(name, error)) from error
    except (OSError, ValueError) as error:
        if place in known and gguf_file is None:
            return AutoConfig.for_model(**known[place])
        ask_hub(name, error)
    try:
        return AutoConfig.from_pretrained(place, **trust)
    except ImportError as error:
        raise UserError(_lacks_library(name, error)) from error


def _lacks_library(name: str, error: ImportError) -> str:
    """The error message where a model of ``transformers`` needs another library: timm, which needs torchvision."""
    reason = " ".join(str(error.__cause__ or error).split())
    if missing := re.search(r"requires the (\S+) library", reason):
        return f"backbone {name!r} needs {missing[1]}, which is not installed: pip install {missing[1]}"
    hint = "see its documentation"
    if "torchvision" in reason:  # PyPI's is built for CUDA, and does not load with a torch for CPUs
        hint = (
            "install the torchvision that is built for this torch: "
            "pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
        )
    return f"backbone {name!r} needs a library that cannot be imported: {reason[:300]}; {hint}"


def ask_hub(name: str, reason: Exception) -> None:
    """Check that the hub has the model, in one short call: a failing download would retry for half a minute.

    Raises:
        UserError: the hub does not have it.
        HubUnreachableError: the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if looks_like_folder(name):
        raise UserError(load_error(name, reason)) from reason
    try:
        HfApi().model_info(resolve(name), revision=split_revision(name)[1], timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(load_error(name, error)) from error
    except Exception as error:  # the types depend on the HTTP library that huggingface_hub uses
        raise HubUnreachableError(load_error(name, error)) from error


def check_reachable(name: str, trust_remote_code: bool = False) -> None:
    """Check before any trial starts that the model is available locally or on the hub.

    Raises:
        UserError: it is not built in, not a folder, and neither in the hub's local cache nor on the hub.
    """
    from transformers.utils import cached_file

    if looks_like_folder(name):
        if not is_builtin(name):
            load_config(name, trust_remote_code)
        elif not Path(resolve(name)).is_dir():
            raise UserError(f"backbone: {name!r} is not built in; {did_you_mean(name, builtin_names())}")
        return
    try:
        cached_file(resolve(name), "config.json", revision=revision_of(name), local_files_only=True)
    except OSError as error:
        ask_hub(name, error)
