"""Cloud machines: the cluster YAML of ``ray up``, and a driver in a detached terminal of its head.

All workers are asked for when the run begins, and let go when it ends: what a trial may ask for, and how many run at
once, is known from the machines that are there.

Keys: https://docs.ray.io/en/latest/cluster/vms/references/ray-cluster-configuration.html.
"""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from clusters.launch import ray_node
from clusters.launch.job import (
    PROFILE,
    RAY_SETTINGS,
    Job,
    Launch,
    brought,
    call,
    check_program,
    plain_name,
    submitted,
)
from clusters.profiles import Machine, RayUp
from harness.core.errors import UserError
from harness.core.files import cache_folder

CLUSTER = "cluster.yaml"
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_HERE = Path(__file__).resolve().parents[2]  # the clone of the harness
_UP_S = 3600.0  # the head starts and installs the harness
_WORKERS_S = 1800  # as the workers do then
# The copy of it in the home folders, from which Python starts: as a folder `harness` there it would be imported.
CLONE = "harness_clone"
_LOG = "harness.log"  # in the home folder of the head, as the next one
_PROCESS = "harness.pid"
_LONGEST_NAME = 40  # characters of a run folder's name in that of the machines; clouds allow 63 for tags


@dataclass(frozen=True)
class RayUpLauncher:
    """Starts the machines with ``ray up``, and the driver with ``ray exec --tmux``."""

    def render(self, job: Job) -> dict[str, str]:
        """The cluster file.

        Raises:
            UserError: the machines cannot get a file of the experiment by its name.
        """
        return {CLUSTER: yaml.safe_dump(_cluster(job), sort_keys=False, width=120)}

    def check(self, job: Job) -> None:
        """Check that the storage outlives the machines, and that no secret would have to be written.

        Raises:
            UserError: it does not, or one would.
        """
        check_program("ssh", "a run on cloud machines")
        if "://" not in job.output:
            raise UserError(f"storage: found {job.output!r}; the machines need a URL, such as s3://bucket/runs")
        if job.profile.secrets:
            raise UserError(
                f"profile {job.profile.name}, secrets: kind ray_up does not pass {job.profile.secrets[0]}; give the "
                "machines a role of the cloud, or set it on them"
            )

    def submit(self, job: Job) -> Launch:
        """Start the machines, copy the experiment and start the driver; returns when it runs.

        Raises:
            UserError: one of the commands of Ray failed.
        """
        cluster = str(job.folder / CLUSTER)
        _make_token(_token_file(job))
        call([*_RAY, "up", "--yes", "--no-config-cache", cluster], _UP_S)
        call([*_RAY, "exec", "--tmux", cluster, f"bash -c {shlex.quote(_script(job))}"], _UP_S)
        return submitted(job, _name(job), address=cluster)

    def state(self, launch: Launch) -> str | None:
        """None: nothing here knows; the run folder says what was done."""
        return None

    def stop(self, launch: Launch) -> str | None:
        """Send SIGTERM to the driver on the head, which stays until ``ray down``.

        Raises:
            UserError: the head cannot be reached.
        """
        call([*_RAY, "exec", launch.address, f"kill -TERM $(cat {_PROCESS})"])
        return f"the driver got SIGTERM; its workers are let go, and the head is ended by `ray down {launch.address}`"

    def log_command(self, launch: Launch, follow: bool) -> list[str] | None:
        """The log on the head."""
        return [*_RAY, "exec", launch.address, f"tail -n +1 {'-f ' if follow else ''}{_LOG}"]


def _section(job: Job) -> RayUp:
    assert job.profile.ray_up is not None  # noqa: S101 - checked when the profile was read
    return job.profile.ray_up


def _name(job: Job) -> str:
    return f"harness-{plain_name(job.folder.parent.name, _LONGEST_NAME)}"


def _token_file(job: Job) -> Path:
    return cache_folder("ray_tokens", _name(job))


def _make_token(path: Path) -> None:
    """Write a new token, unless there is one, into a file that only this user can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(path, "x", opener=partial(os.open, mode=0o600)) as file:
        file.write(secrets.token_hex(32))


def _script(job: Job) -> str:
    """What runs on the head: it waits for the workers, drives the trials, and lets the workers go, however that went.

    What the job brings is in ``~/experiment``.
    """
    workers, python = _section(job).worker, shlex.quote(job.profile.python or "python")
    variables = _assigned({"RAY_ADDRESS": "auto", **RAY_SETTINGS, **job.profile.env})
    command = job.command(job.profile.python or "python", f"experiment/{job.experiment.name}", f"experiment/{PROFILE}")
    hold = f"hold {workers.max_workers} {max(1, workers.min_workers)} {_WORKERS_S}"
    return f"""\
{{
export {variables}
{python} -m clusters.launch.ray_node {hold} && {{
  {command} &
  echo $! > {_PROCESS}
  wait $!
}}
echo "harness ended with exit code $?; the workers are let go"
{python} -m clusters.launch.ray_node release
}} > {_LOG} 2>&1"""


def _assigned(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def _cluster(job: Job) -> dict[str, Any]:
    ray_up = _section(job)
    copied = {**brought(job), PROFILE: job.profile_file}
    for path, file in copied.items():
        if shlex.quote(path) != path:  # Ray makes their folders with a shell, and does not quote them
            raise UserError(f"{file}: kind ray_up copies files by names of letters, digits and any of _./@%+=:,- only")
    python = job.profile.python or "python"
    ray = f"{python} -m ray.scripts.scripts"
    start = f"{_assigned(RAY_SETTINGS)} {ray} start"
    cluster: dict[str, Any] = {
        "cluster_name": _name(job),
        "max_workers": ray_up.worker.max_workers,
        "idle_timeout_minutes": ray_up.idle_timeout_minutes,
        "provider": dict(ray_up.provider),
        "auth": {"ssh_user": ray_up.ssh_user},
        "available_node_types": {
            "head": _machine(ray_up.head),
            "worker": {
                **_machine(ray_up.worker, {ray_node.WORKER: 1}),
                "min_workers": 0,
                "max_workers": ray_up.worker.max_workers,
            },
        },
        "head_node_type": "head",
        "file_mounts": {
            **{f"~/experiment/{path}": str(file) for path, file in copied.items()},
            f"~/{CLONE}": str(_HERE),
            "~/.ray/auth_token": str(_token_file(job)),
        },
        "cluster_synced_files": [],
        "rsync_exclude": ["**/.git", "**/.venv", "**/runs", "**/__pycache__"],
        # All of Ray's keys that say what is run: some of Ray's own values install with a `pip` that may not be there,
        # and a provider that is not Ray's has none.
        "initialization_commands": [],
        "setup_commands": list(ray_up.setup),
        "head_setup_commands": [],
        "worker_setup_commands": [],
        # A Ray that runs is kept: the autoscaler that sees `ray stop` end the others ends the head machine itself.
        "head_start_ray_commands": [
            f"{_assigned(RAY_SETTINGS)} {ray} health-check --address 127.0.0.1:6379 > /dev/null 2>&1 || {{ {ray} stop; "
            f"{start} --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml; }}",
        ],
        "worker_start_ray_commands": [
            f"{ray} stop",
            f"{start} --address=$RAY_HEAD_IP:6379",
        ],
    }
    if ray_up.image:
        cluster["docker"] = {"image": ray_up.image, "container_name": "harness", "pull_before_run": True}
    return cluster


def _machine(machine: Machine, more: Mapping[str, int] | None = None) -> dict[str, Any]:
    return {"node_config": dict(machine.node_config), "resources": {**machine.resources, **(more or {})}}
