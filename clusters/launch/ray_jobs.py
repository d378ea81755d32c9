"""A Ray cluster that runs already: a job of its own job server, which drives the trials from there.

https://docs.ray.io/en/latest/cluster/running-applications/job-submission/. The experiment, its data and the run folder
must have the same paths there as here.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from dataclasses import dataclass

from clusters.launch.job import Job, Launch, call, plain_name, submitted
from harness.core.errors import UserError

DESCRIPTION = "ray_job.json"
_LONGEST_NAME = 100  # characters of a run folder's name in that of a job
_RAY_JOB = (sys.executable, "-m", "ray.scripts.scripts", "job")


@dataclass(frozen=True)
class RayJobLauncher:
    """Submits with ``ray job submit --no-wait``."""

    def render(self, job: Job) -> dict[str, str]:
        """The job server, the command, and its environment."""
        description = {
            "address": job.profile.job_server,
            "entrypoint": job.command(),
            "runtime_env": {"env_vars": dict(job.profile.env)},
        }
        return {DESCRIPTION: json.dumps(description, indent=1) + "\n"}

    def check(self, job: Job) -> None:
        """Check that there is a job server, and that no secret would have to be written.

        Raises:
            UserError: there is none, or one would.
        """
        name = job.profile.name
        if job.profile.job_server is None:
            raise UserError(f"profile {name}, job_server: harness launch needs it, such as http://HOST:8265")
        if job.profile.secrets:
            raise UserError(
                f"profile {name}, secrets: Ray shows the environment of a job to everyone who can list jobs; set "
                f"{job.profile.secrets[0]} on the nodes of the cluster"
            )
        call([*_RAY_JOB, "list", "--address", job.profile.job_server])

    def submit(self, job: Job) -> Launch:
        """Submit the job.

        Raises:
            UserError: the job server cannot be reached or has refused it.
        """
        description = json.loads((job.folder / DESCRIPTION).read_text(encoding="utf-8"))
        name = plain_name(job.folder.parent.name, _LONGEST_NAME)
        job_id, address = f"{name}-{time.time_ns() // 10**6}", description["address"]
        command = [*_RAY_JOB, "submit", "--address", address, "--no-wait", "--submission-id", job_id]
        command += ["--runtime-env-json", json.dumps(description["runtime_env"])]
        call([*command, "--", *shlex.split(description["entrypoint"])])
        return submitted(job, job_id, address=address)

    def state(self, launch: Launch) -> str | None:
        """The job's status, such as running."""
        try:
            text = call([*_RAY_JOB, "status", "--address", launch.address, launch.job_id])
        except UserError:
            return None
        # "Status for job 'ID': RUNNING", but "Job 'ID' succeeded"
        found = re.search(r"\b(pending|running|stopped|succeeded|failed)\b", text.replace(launch.job_id, "").lower())
        return found.group() if found else None

    def stop(self, launch: Launch) -> str | None:
        """None: the driver sees the request in its run folder; ``ray job stop`` would kill it after three seconds."""
        return None

    def log_command(self, launch: Launch, follow: bool) -> list[str] | None:
        """``ray job logs``."""
        command = [*_RAY_JOB, "logs", "--address", launch.address, launch.job_id]
        return [*command, "--follow"] if follow else command
