"""Makes ``timm`` importable where PyPI's torchvision, which is built for CUDA, meets a torch for CPUs."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch

_OPERATORS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: list[torch.library.Library] = []  # its operators are there as long as it is


def timm_or_skip() -> None:
    """Import timm, or skip the test with the reason.

    Torchvision registers a shape for ``torchvision::nms`` when it is imported, which only its own binary declares.
    """
    try:
        importlib.import_module("timm")
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
            del sys.modules[name]
        _library.append(torch.library.Library("torchvision", "DEF"))  # type: ignore[no-untyped-call]
        for declaration in (_OPERATORS, f"q{_OPERATORS}"):
            _library[0].define(declaration)
        importlib.import_module("timm")


_DECLARED = f"""\
import torch
_library = torch.library.Library("torchvision", "DEF")
for _operator in ({_OPERATORS!r}, {"q" + _OPERATORS!r}):
    _library.define(_operator)
"""


def timm_folder(tools: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH with timm, and a torchvision that declares its operators itself: for other processes.

    Args:
        tools: a folder into which both were installed.
        folder: a new one.
    """
    folder.mkdir()
    for part in tools.iterdir():
        if part.name != "torchvision":
            (folder / part.name).symlink_to(part)
    shutil.copytree(
        tools / "torchvision", folder / "torchvision", ignore=shutil.ignore_patterns("*.so*", "__pycache__")
    )
    init = folder / "torchvision/__init__.py"
    init.write_text(f"{_DECLARED}\n{init.read_text(encoding='utf-8')}", encoding="utf-8")
    return folder
