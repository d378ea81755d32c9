"""Cloud machines: the cluster YAML of ``ray up``, and a driver in a detached terminal of its head.

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
_CLONE = Path(__file__).resolve().parents[2]  # of the harness
_UP_S = 3600.0  # machines start and install the harness
_LOG = "harness.log"  # in the home folder of the head, as the next one
_PROCESS = "harness.pid"
_LONGEST_NAME = 40  # characters of a run folder's name in that of the machines; clouds allow 63 for tags


@dataclass(frozen=True)
class RayUpLauncher:
    """Starts the machines with ``ray up``, and the driver with ``ray exec --tmux``."""

    def render(self, job: Job) -> dict[str, str]:
        """The cluster file."""
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
        # `exec`, so that the number is that of the driver.
        driver = f"echo $$ > {_PROCESS}; exec env {_command(job)} > {_LOG} 2>&1"
        call([*_RAY, "exec", "--tmux", cluster, f"bash -c {shlex.quote(driver)}"], _UP_S)
        return submitted(job, _name(job), address=cluster)

    def state(self, launch: Launch) -> str | None:
        """None: nothing here knows; the run folder says what was done."""
        return None

    def stop(self, launch: Launch) -> str | None:
        """Send SIGTERM to the driver on the head; the machines stay until ``ray down``.

        Raises:
            UserError: the head cannot be reached.
        """
        call([*_RAY, "exec", launch.address, f"kill -TERM $(cat {_PROCESS})"])
        return f"the driver got SIGTERM; `ray down {launch.address}` ends the machines"

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


def _command(job: Job) -> str:
    """The driver on the head, with its variables: what the job brings is copied to ``~/experiment``."""
    exports = _assigned({**RAY_SETTINGS, **job.profile.env})
    python = job.profile.python or "python"
    command = job.command(python, f"experiment/{job.experiment.name}", f"experiment/{PROFILE}")
    return f"RAY_ADDRESS=auto {exports} {command}"


def _assigned(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def _cluster(job: Job) -> dict[str, Any]:
    ray_up = _section(job)
    copied = {**brought(job), PROFILE: job.profile_file}
    python = job.profile.python or "python"
    start = f"{_assigned(RAY_SETTINGS)} {python} -m ray.scripts.scripts start"
    cluster: dict[str, Any] = {
        "cluster_name": _name(job),
        "max_workers": ray_up.worker.max_workers,
        "idle_timeout_minutes": ray_up.idle_timeout_minutes,
        "provider": dict(ray_up.provider),
        "auth": {"ssh_user": ray_up.ssh_user},
        "available_node_types": {
            "head": _machine(ray_up.head),
            "worker": {
                **_machine(ray_up.worker),
                "min_workers": ray_up.worker.min_workers,
                "max_workers": ray_up.worker.max_workers,
            },
        },
        "head_node_type": "head",
        "file_mounts": {
            **{f"~/experiment/{path}": str(file) for path, file in copied.items()},
            "~/harness": str(_CLONE),
            "~/.ray/auth_token": str(_token_file(job)),
        },
        "rsync_exclude": ["**/.git", "**/.venv", "**/runs", "**/__pycache__"],
        "setup_commands": list(ray_up.setup),
        "head_start_ray_commands": [
            f"{python} -m ray.scripts.scripts stop",
            f"{start} --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f"{python} -m ray.scripts.scripts stop",
            f"{start} --address=$RAY_HEAD_IP:6379",
        ],
    }
    if ray_up.image:
        cluster["docker"] = {"image": ray_up.image, "container_name": "harness", "pull_before_run": True}
    return cluster


def _machine(machine: Machine) -> dict[str, Any]:
    return {"node_config": dict(machine.node_config), "resources": dict(machine.resources)}
