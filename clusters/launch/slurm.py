"""Slurm: a batch script that starts Ray on every node of the allocation, and the driver on the first one."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from clusters.launch.job import RAY_SETTINGS, Job, Launch, call, check_program, check_secrets_are_set, submitted
from clusters.profiles import Slurm
from harness.core.errors import UserError, did_you_mean

SCRIPT = "sbatch.sh"
_TEMPLATES = Path(__file__).with_name("templates")
_EXPORTED = ("HOME", "LANG", "PATH", "USER")  # of the environment that launches, besides SLURM_* and the secrets
_GONE = "Invalid job id specified"  # Slurm forgets a job some minutes after its end


@dataclass(frozen=True)
class SlurmLauncher:
    """Submits with ``sbatch``; see https://slurm.schedmd.com/sbatch.html."""

    def render(self, job: Job) -> dict[str, str]:
        """The batch script.

        Raises:
            UserError: a path cannot be said in it.
        """
        for path in (str(job.folder), job.name):
            if found := re.search(r"[\\\r\n]", path):
                raise UserError(f"{path!r}: found {found.group()!r}, which Slurm cannot have in names; rename it")
        logs = str(job.folder).replace("%", "%%")  # in names of files, %j and others are Slurm's
        # The scripts are for a shell: autoescape is for HTML, and every value goes through `quoted`.
        environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701
        )
        environment.filters["quoted"] = shlex.quote
        text = environment.get_template(SCRIPT).render(
            name=job.name,
            slurm=_section(job).model_dump(),
            env=job.profile.env,
            ray_settings=RAY_SETTINGS,
            exported=(*_EXPORTED, *job.profile.secrets),
            python=job.python,
            log=f"{logs}/slurm-%j.log",
            ray_log=f"{logs}/ray-%j-%n.log",
            command=job.command(),
        )
        return {SCRIPT: text}

    def check(self, job: Job) -> None:
        """Check that sbatch is here, the partition exists, and the secrets are set.

        Raises:
            UserError: one is not.
        """
        check_program("sbatch", "a Slurm job")
        check_secrets_are_set(job)
        if "://" in job.output:
            raise UserError(f"storage: found {job.output!r}; kind slurm needs a folder that the nodes share")
        partition = _section(job).partition
        found = call(["sinfo", "--noheader", "--format=%R"]).split()
        if unknown := [name for name in partition.split(",") if name not in found]:
            raise UserError(f"slurm.partition: found {unknown[0]!r}; {did_you_mean(unknown[0], set(found))}")

    def submit(self, job: Job) -> Launch:
        """Submit the script with ``sbatch``.

        Raises:
            UserError: Slurm has refused it.
        """
        job_id = call(["sbatch", "--parsable", str(job.folder / SCRIPT)]).strip().partition(";")[0]
        return submitted(job, job_id, job.folder / f"slurm-{job_id}.log")

    def state(self, launch: Launch) -> str | None:
        """The state as ``squeue`` has it, such as PENDING."""
        try:
            found = call(["squeue", "--noheader", "--states=all", f"--jobs={launch.job_id}", "--format=%T"]).split()
        except UserError as error:
            return "ended" if _GONE in str(error) else None
        return found[0] if found else "ended"

    def stop(self, launch: Launch) -> str | None:
        """Cancel a job that waits; a running driver gets SIGTERM, and sees the request in its run folder.

        Raises:
            UserError: scancel failed.
        """
        state = self.state(launch)
        if state == "PENDING":
            call(["scancel", launch.job_id])
            return f"job {launch.job_id} was waiting and is cancelled"
        if state == "RUNNING":
            call(["scancel", "--signal=TERM", launch.job_id])
            return f"job {launch.job_id} got SIGTERM"
        return None

    def log_command(self, launch: Launch, follow: bool) -> list[str] | None:
        """None: the output is in a file."""
        return None


def _section(job: Job) -> Slurm:
    assert job.profile.slurm is not None  # noqa: S101 - checked when the profile was read
    return job.profile.slurm
