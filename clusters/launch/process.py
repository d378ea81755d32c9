"""This machine: a process of its own session, which the end of the terminal does not end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from datetime import datetime

import psutil

from clusters.launch.job import Job, Launch, check_secrets_are_set, submitted

SCRIPT = "run.sh"
_START_S = 60.0  # at most between the start of a process and its record; a number is not used again so soon


@dataclass(frozen=True)
class ProcessLauncher:
    """Starts ``bash run.sh`` in the background."""

    def render(self, job: Job) -> dict[str, str]:
        """The script."""
        exports = [f"export {name}={shlex.quote(value)}" for name, value in job.profile.env.items()]
        return {SCRIPT: "\n".join(["#!/bin/bash", *exports, f"exec {job.command()}", ""])}

    def check(self, job: Job) -> None:
        """Check that the secrets are set.

        Raises:
            UserError: one is not.
        """
        check_secrets_are_set(job)

    def submit(self, job: Job) -> Launch:
        """Start the process."""
        log = job.folder / "run.log"
        with log.open("a") as output:
            process = subprocess.Popen(
                ["bash", str(job.folder / SCRIPT)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        return submitted(job, str(process.pid), log)

    def state(self, launch: Launch) -> str | None:
        """Whether the process is alive, where it is on this machine."""
        if launch.host != os.uname().nodename:
            return None
        return "running" if _process(launch) else "ended"

    def stop(self, launch: Launch) -> str | None:
        """Send SIGTERM to the process, if it is on this machine."""
        if launch.host != os.uname().nodename or _process(launch) is None:
            return None
        os.kill(int(launch.job_id), signal.SIGTERM)
        return f"process {launch.job_id} got SIGTERM"

    def log_command(self, launch: Launch, follow: bool) -> list[str] | None:
        """None: the output is in a file."""
        return None


def _process(launch: Launch) -> psutil.Process | None:
    """The process; None if it has ended, also where its number is used again."""
    submitted_at = datetime.fromisoformat(launch.submitted_at).timestamp()
    try:
        process = psutil.Process(int(launch.job_id))
        own = abs(process.create_time() - submitted_at) < _START_S
        return process if own and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None
