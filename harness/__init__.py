"""harness: which parameter-efficient fine-tuning method for this modality, with this much data?

Plugin authors import the contracts from here: ``from harness import Task, Modality, Metric, AdapterMethod, Delta``.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_CONTRACTS = {
    "AdapterMethod": "adapters.base",
    "Delta": "adapters.base",
    "Example": "tasks.base",
    "Metric": "tasks.base",
    "Modality": "tasks.base",
    "Scores": "tasks.base",
    "Task": "tasks.base",
    "UserError": "harness.errors",
}
__all__ = list(_CONTRACTS)


def _check_siblings() -> None:
    """The packages are flat, and PyPI has others of the same names: name the intruder rather than run its code."""
    root = Path(__file__).resolve().parent.parent
    for name in ("adapters", "tasks", "results", "clusters"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != root:
            raise ImportError(
                f"harness needs its own package {name!r} beside it in {root}, but Python finds {origin}; "
                "install the harness from its clone (pip install -e .) in an environment of its own"
            )


def __getattr__(name: str) -> Any:
    """Contracts are imported on first use: they need torch, which `import harness` should not."""
    if name not in _CONTRACTS:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(_CONTRACTS[name]), name)


_check_siblings()
