"""The cache of features on this machine: where it is, how large it may be, and what features depend on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from harness.core.disk_cache import DiskCache
from harness.core.errors import UserError
from harness.core.files import cache_folder, digest_of, digests_of
from harness.core.forecast import GIB
from harness.experiment.sections import Resources
from harness.model.inputs import Inputs
from harness.model.kept import Key

_ROOT = Path(__file__).resolve().parents[2]
SIZE_VARIABLE, DEFAULT_GIB = "HARNESS_FEATURE_CACHE_GIB", 100.0
# What decodes files and computes features, besides what an encoder's fingerprint says.
_LIBRARIES = (
    "torch", "torchvision", "transformers", "timm", "numpy", "scipy", "pillow", "soundfile", "soxr", "librosa",
)  # fmt: skip
Digest = Callable[[Path], str]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnDisk:
    """The cache of features on this machine.

    Attributes:
        cache: its folder and size.
        digest: SHA-256 of a file's content.
        threads: of the CPU, with which features are computed: rounding depends on their number.
        source: the task with its options: what augmentation depends on.
    """

    cache: DiskCache
    digest: Digest
    threads: int
    source: str = ""


def cache_of(resources: Resources) -> DiskCache | None:
    """The cache of features that trials with these resources use; None: they are kept in memory, as was asked for.

    Raises:
        UserError: the environment variable of its size is no number.
    """
    size_gib = resources.feature_cache_gib
    if size_gib is None:
        size_gib = _size_of_environment()
    if not size_gib:
        return None
    folder = Path(resources.feature_cache).expanduser() if resources.feature_cache else cache_folder("features")
    change = (
        "set HARNESS_CACHE or resources.feature_cache to a folder with room, or resources.feature_cache_gib to what it "
        "may take; 0 keeps features in memory, where each worker encodes them again"
    )
    return DiskCache(folder, int(size_gib * GIB), change)


def disk_of(resources: Resources, run: Path) -> OnDisk | None:
    """The cache of features for trials of a run folder, which knows the digests of their files.

    Raises:
        UserError: as ``cache_of``.
    """
    found = cache_of(resources)
    return None if found is None else OnDisk(found, Inputs(run).digest, resources.cpus_per_worker)


def _size_of_environment() -> float:
    found = os.environ.get(SIZE_VARIABLE) or DEFAULT_GIB
    try:
        size_gib = float(found)
    except ValueError:
        size_gib = math.nan
    if not 0 <= size_gib < math.inf:
        raise UserError(f"{SIZE_VARIABLE}: found {found!r}; allowed: a number of GiB, or 0 for no cache on disk")
    return size_gib


def disk_of_process() -> OnDisk | None:
    """The cache of features for what belongs to no run; None where there is none, or it cannot be written to.

    Raises:
        UserError: as ``cache_of``.
    """
    found = cache_of(Resources())
    try:
        if found is not None:
            found.check()
    except UserError as error:
        logger.warning("features are not kept on disk: %s", error)
        return None
    return None if found is None else OnDisk(found, digest_of, torch.get_num_threads())


def shelf_name(key: Key, device: torch.device, encoder: type, threads: int) -> str:
    """A digest of what features depend on besides the items of a call: the encoder with its code, and what computes."""
    on_gpu = device.type == "cuda"
    place = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    content = [[str(part) for part in key], place, 0 if on_gpu else threads, _libraries(), _code(encoder)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@cache
def _libraries() -> tuple[str, ...]:
    found = [f"torch {torch.__version__}"]
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return tuple(found)


@cache
def _code(encoder: type) -> list[str]:
    """Digests of the harness's code that reads files and makes features: another version may make others."""
    folders = {_ROOT / "tasks" / "modalities", _ROOT / "tasks" / "containers"}
    with suppress(TypeError, OSError):  # a class without a file
        source = Path(inspect.getfile(encoder)).resolve()
        folders |= {source.parent} if source.is_relative_to(_ROOT / "harness") else set()
    return digests_of(sorted(path for folder in folders for path in folder.rglob("*.py")))
