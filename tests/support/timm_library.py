"""Makes ``timm`` importable where PyPI's torchvision, which is built for CUDA, meets a torch for CPUs."""

from __future__ import annotations

import importlib
import sys

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
