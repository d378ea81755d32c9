"""What a trial costs apart from its work: ``python -m benchmarks.orchestration [--trials 10000] [--rounds 1]``.

Trials of near-zero work run on two cores, in turn through the sweep of the harness (scheduler, events, display,
records, MLflow in SQLite) and through plain Ray Tune, which runs the same no-op with reused actors and keeps nothing.
Each arm is a process of its own. Printed, of each: seconds and CPU seconds per trial from the first to the last that
ended (start-up is apart), and in the first and the last tenth; memory that the driver gained per trial; and how long a
Ctrl-C in the middle of a sweep takes to return. The machine's load is printed too: compare the arms, not the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ARMS = ("plain", "harness")
CORES = 2
GOAL_RATIO, GOAL_KIB, GOAL_CTRL_C_S = 1.15, 20, 5


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="How often each arm runs, in turn.")
    parser.add_argument("--arm", choices=(*ARMS, "ctrl-c"), help="Run this arm alone and print its JSON.")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.trials)))
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in (*ARMS, "ctrl-c")}
    for _ in range(options.rounds):
        for arm in ARMS:
            found[arm].append(in_process(arm, options.trials))
    found["ctrl-c"].append(in_process("ctrl-c", options.trials))
    show(found, options.trials)


def in_process(arm: str, trials: int) -> dict[str, float]:
    """Run an arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.orchestration", "--arm", arm, "--trials", str(trials)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(found: dict[str, list[dict[str, float]]], trials: int) -> None:
    """Print the table and the goals."""
    console = Console()
    table = Table(title=f"{trials} trials, medians of {len(found['plain'])} rounds; load {os.getloadavg()[0]:.1f}")
    keys = list(found["plain"][0])
    for heading in ("", *ARMS, "ratio"):
        table.add_column(heading, justify="left" if not heading else "right")
    for key in keys:
        plain, ours = (median(run[key] for run in found[arm]) for arm in ARMS)
        table.add_row(key, f"{plain:.4g}", f"{ours:.4g}", f"{ours / plain:.2f}" if plain else "")
    console.print(table)
    console.print(f"Ctrl-C returned after {found['ctrl-c'][0]['returned_s']:.1f} s (goal: {GOAL_CTRL_C_S} s)")
    console.print(f"goals: ratio at most {GOAL_RATIO}, memory at most {GOAL_KIB} KiB a trial")


class Meter:
    """When trials ended, and the driver's memory then."""

    def __init__(self, trials: int) -> None:
        self.trials = trials
        self.ended: list[float] = []
        self._memory: dict[int, int] = {}  # trials ended → resident bytes
        self._cpu: dict[int, tuple[float, float]] = {}  # process → CPU seconds at the first end, and when last seen

    def tick(self) -> None:
        """A trial has ended."""
        self.ended.append(time.monotonic())
        count = len(self.ended)
        if count % max(1, self.trials // 20) == 0 or count in {1, self.trials}:
            for pid, used in _cpu_seconds().items():
                first, _ = self._cpu.get(pid, (used if count == 1 else 0.0, used))
                self._cpu[pid] = first, used
        if count in {self.trials // 10, self.trials}:
            self._memory[count] = psutil.Process().memory_info().rss

    def result(self) -> dict[str, float]:
        """Per trial, from the first to the last that ended."""
        ended, tenth = self.ended, max(2, self.trials // 10)
        (few, before), (many, after) = sorted(self._memory.items())

        def each(times: list[float]) -> float:
            return (times[-1] - times[0]) / (len(times) - 1)

        return {
            "seconds per trial": each(ended),
            "CPU seconds per trial": sum(last - first for first, last in self._cpu.values()) / (len(ended) - 1),
            "seconds per trial, first tenth": each(ended[:tenth]),
            "seconds per trial, last tenth": each(ended[-tenth:]),
            "driver memory per trial, KiB": (after - before) / (many - few) / 1024,
        }


def _cpu_seconds() -> dict[int, float]:
    """Of this process and all that it started, and that still live."""
    found = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended
            found[process.pid] = sum(process.cpu_times()[:2])
    return found


def run_arm(arm: str, trials: int) -> dict[str, float]:
    """Run one arm in this process; results by name."""
    meter = Meter(trials)
    with tempfile.TemporaryDirectory(prefix="orchestration-") as scratch:
        if arm == "plain":
            run_plain(Path(scratch), trials, meter.tick)
            return meter.result()
        if arm == "harness":
            run_harness(Path(scratch), trials, meter.tick)
            return meter.result()
        return {"returned_s": interrupted(Path(scratch), trials)}


def run_plain(folder: Path, trials: int, tick: Callable[[], None]) -> None:
    """The no-op through Ray Tune alone, with the settings that make it quiet."""
    from harness.sweep.cluster import own_ray
    from harness.sweep.ray_library import tune

    class Ticks(tune.Callback):  # type: ignore[misc]
        def __getstate__(self) -> dict[str, Any]:
            return {}

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            tick()

    def no_op(_: dict[str, Any]) -> None:
        tune.report({"fraction": 1.0})

    with own_ray():
        tune.Tuner(
            tune.with_resources(no_op, {"CPU": 1}),
            param_space={"trial": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=CORES),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0, callbacks=[Ticks()]),
        ).fit()


def run_harness(folder: Path, trials: int, tick: Callable[[], None]) -> None:
    """The no-op through the sweep, with its events, records and MLflow."""
    from harness.experiment.load import Experiment
    from harness.sweep.live import LiveTable
    from harness.sweep.run import prepare
    from harness.sweep.tune import Sweep, sweep
    from harness.tracking.grid import close_grid, open_grid

    class Display(LiveTable):
        def ended(self, record: Any) -> None:
            super().ended(record)
            tick()

    experiment = Experiment(
        name="no-op",
        task="scenes",
        adapters=[{"method": "none", "learning_rate": 1e-3}],
        budget={"examples": 8},
        seeds=range(trials),
        resources={"max_concurrent_trials": CORES},
    )
    prepared = prepare(experiment, folder)
    prepared.folder.mkdir(parents=True)
    grid = open_grid(f"sqlite:///{folder / 'mlflow.db'}", experiment.name, prepared.folder)
    todo = list(zip(prepared.specs, prepared.plan.trials, strict=True))
    wanted = Sweep(todo, experiment.name, prepared.folder, experiment.resources, grid, work=no_work)
    with (folder / "log.txt").open("w") as log, Display(Console(file=log), prepared.plan.trials, 0) as display:
        sweep(wanted, display)
    close_grid(grid, True, [])


def no_work(spec: Any, experiment: str, run: Path, *given: Any) -> Any:
    """What ``run_trial`` does around its work: it reports, and writes and logs a record."""
    from harness.core.record import Epoch, TrialRecord
    from harness.trial.outcome import conclude
    from harness.trial.trial import Progress

    _, tracker, report, *_ = given
    report(Progress(1.0, "train", 1, 1.0, 2.0))
    scores = {"perplexity": 2.0}
    record = TrialRecord(
        trial_id=spec.trial_id,
        experiment=experiment,
        status="finished",
        spec=spec.model_dump(mode="json"),
        seed=spec.seed,
        metrics={"validation": scores, "test": scores},
        history=(Epoch(epoch=1, step=1, train_loss=1.0, validation_perplexity=2.0, learning_rate=1e-3),),
        best_epoch=1,
        wall_time_s=0.0,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        mlflow_run_id=tracker.run_id,
    )
    tracker.metrics({"train_loss": 1.0, "validation_perplexity": 2.0}, step=1)
    conclude(record, run, tracker)
    return record


def interrupted(folder: Path, trials: int) -> float:
    """Seconds from a Ctrl-C after a twentieth of the trials until the sweep has returned."""
    ended, pressed = 0, [0.0]

    def tick() -> None:
        nonlocal ended
        ended += 1
        if ended == max(2, trials // 20):
            threading.Timer(0.0, press).start()

    def press() -> None:
        pressed[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    try:
        run_harness(folder, trials, tick)
    except KeyboardInterrupt:
        return time.monotonic() - pressed[0]
    raise RuntimeError("the sweep ended before it was interrupted")


if __name__ == "__main__":
    main()
