"""``plan_run``: what an experiment will cost, for scripts; ``harness plan`` shows the same."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from clusters.profiles import load_profile
from harness.core.forecast import Forecast
from harness.experiment.load import Experiment
from harness.sweep.forecast import forecast_of
from harness.sweep.run import prepare


def plan_run(
    experiment: Experiment | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    profile: str | Path = "local",
    probe: bool = False,
    console: Console | None = None,
) -> Forecast:
    """Forecast what an experiment will cost, without training, downloading or writing into its run folder.

    Args:
        experiment: built in Python, or the path of a YAML file.
        output: parent of the run folders, as for ``run_experiment``.
        fresh: as if it started again in a new run folder.
        profile: where it would run: for the memory and the rate of its devices, and its price.
        probe: measure 20 training steps, and a few scored and generated examples, of every shape that was not probed
            before; this prepares the task's data.
        console: for progress; default: standard output.

    Raises:
        UserError: the experiment or the profile is invalid.
    """
    experiment = experiment if isinstance(experiment, Experiment) else Experiment.from_yaml(experiment)
    cluster = load_profile(profile)
    prepared = prepare(experiment, output or cluster.storage or "runs", fresh)
    return forecast_of(prepared, cluster, console, probe=probe)
