"""The launcher of each kind of profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clusters.launch.job import Launch, Launcher, is_own, read_launch
from clusters.launch.kuberay import KubeRayLauncher
from clusters.launch.process import ProcessLauncher
from clusters.launch.ray_jobs import RayJobLauncher
from clusters.launch.ray_up import RayUpLauncher
from clusters.launch.slurm import SlurmLauncher
from clusters.profiles import Kind

LAUNCHERS: Mapping[Kind, Launcher] = {
    "local": ProcessLauncher(),
    "ray": RayJobLauncher(),
    "slurm": SlurmLauncher(),
    "kuberay": KubeRayLauncher(),
    "ray_up": RayUpLauncher(),
}
# States of jobs that run or will run, of all kinds, in lower case.
_GOING_ON = ("pending", "running", "completing", "configuring", "requeued", "suspended", "initializing", "waiting")


def state_of(run: Path) -> tuple[Launch | None, str | None]:
    """The latest launch of a run and its state now; None: not launched, or not from here.

    Raises:
        UserError: its record cannot be read.
    """
    launched = read_launch(run)
    return launched, LAUNCHERS[launched.kind].state(launched) if launched and is_own(launched) else None


def goes_on(state: str | None) -> bool:
    """Whether a job in this state runs or will run."""
    return state is not None and state.lower() in _GOING_ON


def launch_line(run: Path) -> str | None:
    """What is known of the latest launch of a run, for ``harness status``; None if it was not launched."""
    launched, state = state_of(run)
    if launched is None:
        return None
    return f"{launched.kind} job {launched.job_id}, {state or 'state unknown here'}; submitted {launched.submitted_at}"
