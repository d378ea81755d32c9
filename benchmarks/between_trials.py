"""What a trial costs beside training and scoring: ``python benchmarks/between_trials.py [--rounds 2] [--json FILE]``.

Runs a grid of small quickstart trials one after another in one process, as a worker does, with records and MLflow. The
overhead of a trial is its time without training steps, validation, generation, likelihoods and metrics. The table has
medians over the trials after the first one, which pays for imports and the start of Java.

``--against FOLDER`` runs the same in another checkout as well, in turn with this one, and compares the scores of all
trials, which must be equal to four digits. ``--profile`` prints the functions that take the overhead's time.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    # Python puts this folder first, where metrics.py shadows a module of the same name; the child of ``--against`` runs
    # this file with the packages of the other checkout.
    sys.path[0] = os.environ.get("BETWEEN_TRIALS_CHECKOUT", str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent.parent
EXPERIMENT = """\
name: between_trials
task: {name: scenes}
backbone: {language_model: builtin/tiny-llama, encoders: {image: builtin/tiny-vision}}
adapters:
  - {method: none, learning_rate: 1e-2}
  - {method: ia3, grouping: specific, learning_rate: 0.2}
  - {method: bitfit, grouping: agnostic, learning_rate: 0.12}
  - {method: lora, rank: 4, grouping: [agnostic, specific], learning_rate: 1.2e-2}
  - {method: full, learning_rate: 6e-3}
budget: {examples: 64, epochs: 1}
seeds: [0, 1]
optimizer: {per_device_train_batch_size: 16, lr_scheduler_type: cosine, warmup_ratio: 0.05}
eval: {validation_examples: 16, test_examples: 32, max_new_tokens: 8}
"""
_TRACKER = "harness.tracking.grid harness.tracking.tracker"
_SCORING = "harness.trial.trial harness.trial.best"  # where it was, and where it is
# Work that the trial is for; whatever else it does is overhead. Modules, class, function.
WORK = {
    "training steps": ("harness.trial.trial", "Trial", "step_on"),
    "likelihoods": ("harness.trial.evaluate", "Evaluator", "likelihood"),
    "generation": ("harness.trial.evaluate", "Evaluator", "generate"),
    "metrics": (_SCORING, None, "score_members"),
    "baselines": (_SCORING, None, "answers_of"),
}
# Parts of the overhead; what they do not name is "other". One inside another counts with the outer one alone.
PARTS = {
    "MLflow, start": (_TRACKER, "MlflowTracker", "__init__"),
    "MLflow, epochs": (_TRACKER, "MlflowTracker", "metrics"),
    "MLflow, end": (_TRACKER, "MlflowTracker", "finish"),
    "process": ("harness.trial.trial", None, "prepare_process"),
    "memory meter": ("harness.trial.measure", "PeakMemory", "__init__"),
    "reading data": ("harness.model.build", None, "read_data"),
    "language model": ("harness.model.backbones", None, "load_language_model"),
    "adapters": ("harness.model.build", None, "assemble"),
    "counting parameters": ("harness.model.parameters", None, "count_parameters"),
    "engine": ("harness.trial.stages", None, "Engine"),
    "encoders": ("harness.model.features", "Features", "precompute"),
    "fingerprints": ("harness.trial.trial", "Trial", "_data"),
    "weights": ("harness.trial.engine", "Engine", "save_weights"),
    "previews": (_SCORING, None, "write_previews"),
    "examples.parquet": (_SCORING, None, "write_examples"),
    "record": ("harness.trial.outcome", None, "write_record"),
    "versions": ("harness.trial.measure", None, "versions"),
    "closing": ("harness.trial.stages", "Stages", "close"),
}


class Watch:
    """Times of the functions it wraps, of one trial; only the outermost of nested calls of a thread counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.work: list[tuple[float, float]] = []  # when something of WORK began and ended, in any thread
        self.profile: cProfile.Profile | None = None
        self._thread = threading.local()

    def wrap(self, name: str, module: str, owner: str | None, function: str, is_work: bool) -> None:
        """Wrap a function in place; one that this checkout does not have is left out."""
        try:
            place = importlib.import_module(module)
        except ImportError:
            return
        place = getattr(place, owner, None) if owner else place
        original = getattr(place, function, None) if place is not None else None
        if original is not None:
            setattr(place, function, self._timed(name, original, is_work))

    def _timed(self, name: str, original: Callable[..., Any], is_work: bool) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if getattr(self._thread, "inside", False):
                return original(*args, **options)
            profile = self.profile if is_work and threading.current_thread() is threading.main_thread() else None
            self._thread.inside, began = True, time.perf_counter()
            if profile:
                profile.disable()
            try:
                return original(*args, **options)
            finally:
                ended = time.perf_counter()
                self.seconds[name] = self.seconds.get(name, 0.0) + ended - began
                if is_work:
                    self.work.append((began, ended))
                self._thread.inside = False
                if profile:
                    profile.enable()

        return timed

    def worked_s(self) -> float:
        """Seconds in which something of WORK ran, maybe several at once."""
        total, until = 0.0, 0.0
        for began, ended in sorted(self.work):
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total


def main() -> None:
    """Run the benchmark and print the table."""
    options = _options()
    if options.child:
        print(json.dumps(_grid(Path(options.child), options.profile)))
        return
    checkouts = {"here": HERE} | ({"against": options.against.resolve()} if options.against else {})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, checkout in checkouts.items() if number % 2 == 0 else reversed(checkouts.items()):
                found[name].append(_run(checkout, Path(folder) / f"{name}-{number}", options.profile))
    console = Console(width=110)
    if options.against:
        _compare(found["here"][0]["scores"], found["against"][0]["scores"])
        console.print(f"{len(found['here'][0]['scores'])} trials: scores and examples are equal to the last digit")
    console.print(_table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="processes per checkout")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--profile", action="store_true", help="print what the overhead consists of")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(checkout: Path, folder: Path, profile: bool) -> dict[str, Any]:
    """Run the grid in a process of its own, with the packages of a checkout."""
    command = [sys.executable, __file__, "--child", str(folder), *(["--profile"] if profile else [])]
    environment = os.environ | {"BETWEEN_TRIALS_CHECKOUT": str(checkout), "MLFLOW_TRACKING_URI": ""}
    done = subprocess.run(command, env=environment, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _grid(folder: Path, profile: bool) -> dict[str, Any]:
    """Run the grid in this process; the times and scores of each trial."""
    from harness.core.files import write_atomically
    from harness.experiment.load import Experiment
    from harness.sweep.run import prepare
    from harness.tracking.grid import open_grid

    run_trial = _found("run_trial", "harness.trial.attempt", "harness.trial.trial")
    tracker_class = _found("MlflowTracker", "harness.tracking.tracker", "harness.tracking.grid")
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(EXPERIMENT, encoding="utf-8")
    experiment = Experiment.from_yaml(folder / "experiment.yaml")
    prepared = prepare(experiment, folder / "runs")
    run = prepared.folder
    run.mkdir(parents=True)
    write_atomically(run / "plan.json", prepared.plan.model_dump_json(indent=1))
    grid = open_grid(prepared.mlflow_uri, experiment.name, run)
    watch = Watch()
    for places, is_work in ((WORK, True), (PARTS, False)):
        for name, (modules, owner, function) in places.items():
            for module in modules.split():
                watch.wrap(name, module, owner, function, is_work)
    kept = _kept()
    trials, scores = [], {}
    for number, (spec, planned) in enumerate(zip(prepared.specs, prepared.plan.trials, strict=True)):
        watch.seconds, watch.work = {}, []
        began, cpu = time.perf_counter(), time.process_time()
        if profile and number:
            watch.profile = watch.profile or cProfile.Profile()
            watch.profile.enable()
        tracker = tracker_class(grid, spec, planned, run / "trials" / spec.trial_id)
        record = run_trial(spec, experiment.name, run, experiment.resources, tracker, lambda _: None, **kept)
        if watch.profile:
            watch.profile.disable()
        total_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        trials.append({"total": total_s, "cpu": cpu_s, "overhead": total_s - watch.worked_s(), **watch.seconds})
        if record.status != "finished":
            raise SystemExit(f"{spec.trial_id}: {record.reason}")
        scores[spec.trial_id] = _outcome(run / "trials" / spec.trial_id)
    if watch.profile:
        for order in ("tottime", "cumulative"):
            pstats.Stats(watch.profile, stream=sys.stderr).sort_stats(order).print_stats(70)
    return {"trials": trials, "scores": scores}


def _found(name: str, *modules: str) -> Any:
    """A function or class from the first of these modules that this checkout has."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"no {name} in {' or '.join(modules)}")


def _kept() -> dict[str, Any]:
    """What a worker passes to each trial; nothing in a checkout in which trials leave nothing for one another."""
    try:
        from harness.model.kept import OF_WORKER
    except ImportError:
        return {}
    return {"kept": OF_WORKER}


def _outcome(trial: Path) -> dict[str, Any]:
    """What must be equal whatever ran before in the process: scores, losses, fingerprints, and per-example values."""
    import pandas as pd

    record = json.loads((trial / "record.json").read_text(encoding="utf-8"))
    kept = ("metrics", "history", "best_epoch", "parameters", "data", "answers", "warnings")
    examples = pd.read_parquet(trial / "examples.parquet").drop(columns="inputs")
    return {**{key: record[key] for key in kept}, "examples": json.loads(examples.to_json(orient="split"))}


def _compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    if one.keys() != other.keys():
        raise SystemExit("the two checkouts have other trial ids")
    for trial_id, outcome in one.items():
        for key, value in outcome.items():
            if rounded(value) != rounded(other[trial_id][key]):
                raise SystemExit(f"{trial_id}: {key} differs: {value} and {other[trial_id][key]}")


def rounded(value: Any) -> Any:
    """Numbers to four digits: the order of additions differs where references share a row."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _table(found: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table("ms per trial, median", *found)
    trials = {name: [t for run in runs for t in run["trials"][1:]] for name, runs in found.items()}

    def row(title: str, value: Callable[[dict[str, float]], float], style: str = "") -> None:
        table.add_row(title, *(f"{1000 * median(map(value, trials[name])):,.0f}" for name in found), style=style)

    row("whole trial", lambda t: t["total"])
    row("whole trial, CPU", lambda t: t["cpu"])
    for name in WORK:
        row(f"work: {name}", lambda t, name=name: t.get(name, 0.0))
    row("overhead", lambda t: t["overhead"], "bold")
    for name in PARTS:
        row(f"  {name}", lambda t, name=name: t.get(name, 0.0))
    row("  other", lambda t: t["overhead"] - sum(t.get(name, 0.0) for name in PARTS))
    for title, key in (
        ("first trial of the process", "total"),
        ("  its metrics", "metrics"),
        ("  its overhead", "overhead"),
    ):
        firsts = (f"{1000 * median(run['trials'][0][key] for run in runs):,.0f}" for runs in found.values())
        table.add_row(title, *firsts)
    return table


if __name__ == "__main__":
    main()
