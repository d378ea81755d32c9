"""Compare parameter-efficient fine-tuning methods of language models on image, audio, series and text tasks.

``harness.run_experiment("experiment.yaml")`` runs an experiment, ``harness.Experiment(...)`` writes one in Python, and
``harness.load_results("runs/experiment")`` reads what it wrote.
``harness.adapt(model, {"method": "lora", "rank": 8}, grouping="specific")`` attaches context-grouped adapters to any
Hugging Face causal LM, without the rest of the harness.

Plugins subclass the contracts exported here: ``from harness import Task, Modality, Metric, AdapterMethod, Delta``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from adapters.base import AdapterMethod, Delta
    from adapters.base import Config as AdapterConfig
    from adapters.library.adapted_model import AdaptedModel, adapt, detach, load_adapter
    from adapters.library.peft_import import import_peft
    from adapters.placement.roles import Target
    from harness.core.errors import UserError
    from harness.core.forecast import Forecast
    from harness.core.paths import ExperimentPath
    from harness.core.weight_decay import parameter_groups
    from harness.doctor.doctor import diagnose
    from harness.experiment.load import Experiment
    from harness.sweep.plan_run import plan_run
    from harness.sweep.profile import profile_run
    from harness.sweep.run import run_experiment
    from harness.sweep.sync import sync_run
    from harness.trained.export import export_trial
    from harness.trained.model import Trained, load_trained
    from results.loaded import Results, load_results
    from tasks.base import Config as TaskConfig
    from tasks.base import Example, Metric, Modality, Part, Preview, Scores, Split, Task
    from tasks.encoder import Encoder

# Whatever imports it (DeepSpeed, peft), bitsandbytes warns on a CPU that a kernel of its own layers is missing: the
# first line of every trial's log.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_PUBLIC = {
    "AdaptedModel": "adapters.library.adapted_model:AdaptedModel",
    "AdapterConfig": "adapters.base:Config",
    "AdapterMethod": "adapters.base:AdapterMethod",
    "Delta": "adapters.base:Delta",
    "Encoder": "tasks.encoder:Encoder",
    "Example": "tasks.base:Example",
    "Experiment": "harness.experiment.load:Experiment",
    "ExperimentPath": "harness.core.paths:ExperimentPath",
    "Forecast": "harness.core.forecast:Forecast",
    "Metric": "tasks.base:Metric",
    "Modality": "tasks.base:Modality",
    "Part": "tasks.base:Part",
    "Preview": "tasks.base:Preview",
    "Results": "results.loaded:Results",
    "Scores": "tasks.base:Scores",
    "Split": "tasks.base:Split",
    "Target": "adapters.placement.roles:Target",
    "Task": "tasks.base:Task",
    "TaskConfig": "tasks.base:Config",
    "Trained": "harness.trained.model:Trained",
    "UserError": "harness.core.errors:UserError",
    "adapt": "adapters.library.adapted_model:adapt",
    "detach": "adapters.library.adapted_model:detach",
    "diagnose": "harness.doctor.doctor:diagnose",
    "export_trial": "harness.trained.export:export_trial",
    "import_peft": "adapters.library.peft_import:import_peft",
    "load_adapter": "adapters.library.adapted_model:load_adapter",
    "load_trained": "harness.trained.model:load_trained",
    "load_results": "results.loaded:load_results",
    "parameter_groups": "harness.core.weight_decay:parameter_groups",
    "plan_run": "harness.sweep.plan_run:plan_run",
    "profile_run": "harness.sweep.profile:profile_run",
    "run_experiment": "harness.sweep.run:run_experiment",
    "sync_run": "harness.sweep.sync:sync_run",
}
__all__ = [
    "AdaptedModel",
    "AdapterConfig",
    "AdapterMethod",
    "Delta",
    "Encoder",
    "Example",
    "Experiment",
    "ExperimentPath",
    "Forecast",
    "Metric",
    "Modality",
    "Part",
    "Preview",
    "Results",
    "Scores",
    "Split",
    "Target",
    "Task",
    "TaskConfig",
    "Trained",
    "UserError",
    "adapt",
    "detach",
    "diagnose",
    "export_trial",
    "import_peft",
    "load_adapter",
    "load_results",
    "load_trained",
    "parameter_groups",
    "plan_run",
    "profile_run",
    "run_experiment",
    "sync_run",
]


def _check_siblings() -> None:
    """Check that the top-level packages are our own: PyPI has distributions with the same package names.

    Raises:
        ImportError: Python finds another package under one of these names.
    """
    root = Path(__file__).resolve().parent.parent
    for name in ("adapters", "tasks", "results", "clusters"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != root:
            raise ImportError(
                f"harness needs its package {name!r} in {root}, but Python finds {origin}; "
                "install the harness from its clone (pip install -e .) in a separate environment"
            )


def __getattr__(name: str) -> Any:
    """Import public names on first use: most of them need torch, which ``import harness`` should not load."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


_check_siblings()
