"""What a launcher is given, what it must do, and the record of a launch in the run folder."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from clusters.profiles import SECRET, Kind, Profile
from harness.core.errors import UserError
from harness.core.files import cache_folder, write_atomically

FOLDER = "launch"  # in a run folder: rendered files, logs of drivers, the record
RECORD = "launch.json"
PROFILE = "profile.yaml"  # whatever the profile is called: no name of it is that of another rendered file
# Of every Ray that a launcher starts. Who reaches a port of it needs its token. Without its memory monitor: where that
# kills a worker, Tune does not handle the error and the whole sweep ends; if the kernel does, only that trial fails.
RAY_SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
_SHORTEST_SECRET = 6  # characters; a shorter value of a variable may be in a text by chance


@dataclass(frozen=True)
class Job:
    """An experiment to run somewhere else.

    Attributes:
        name: of the experiment.
        experiment: its file, absolute.
        plugins: the Python files that it loads, absolute.
        output: the folder or URL that contains the run folders.
        folder: where the rendered files and the record are written, on this machine: ``RUN/launch``.
        profile: where to run.
        options: further options of ``harness run``.
    """

    name: str
    experiment: Path
    plugins: tuple[Path, ...]
    output: str
    folder: Path
    profile: Profile
    options: tuple[str, ...] = ()

    @property
    def profile_file(self) -> Path:
        """The copy of the profile that the job reads."""
        return self.folder / PROFILE

    @property
    def python(self) -> str:
        """The Python of the harness where the job runs."""
        return self.profile.python or sys.executable

    def command(
        self, python: str | None = None, experiment: str | Path | None = None, profile: str | Path | None = None
    ) -> str:
        """The ``harness run`` of the job, quoted for a shell; the arguments are where the job finds things."""
        words = [python or self.python, "-m", "harness", "run", str(experiment or self.experiment)]
        words += ["--profile", str(profile or self.profile_file), "--output", self.output, *self.options]
        return shlex.join(words)


class Launch(BaseModel):
    """The record of a launch: ``RUN/launch/launch.json``."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Kind
    profile: str
    job_id: str
    host: str  # that launched
    submitted_at: str  # UTC, ISO 8601
    log: str = ""  # the file with the output of the driver; "" where it is not in a file
    address: str = ""  # of what took the job: a namespace, a job server, a cluster file


class Launcher(Protocol):
    """A way to run a job; a module of this package has one for each kind of profile."""

    def render(self, job: Job) -> dict[str, str]:
        """The files that describe the job, by name; the first is the one that is submitted. Nothing is written."""

    def check(self, job: Job) -> None:
        """Check that the job can be submitted from here.

        Raises:
            UserError: it cannot.
        """

    def submit(self, job: Job) -> Launch:
        """Submit the rendered files in the job's folder; the job does not need this process.

        Raises:
            UserError: what takes jobs has refused it; the message has its words.
        """

    def state(self, launch: Launch) -> str | None:
        """The state of the job in the words of what runs it; None: it is not known there, or it cannot be asked."""

    def stop(self, launch: Launch) -> str | None:
        """End the job in order; what was done, or None if only the request in the run folder can reach it."""

    def log_command(self, launch: Launch, follow: bool) -> list[str] | None:
        """The command that prints the driver's output, where it is in no file."""


def plain_name(name: str, longest: int) -> str:
    """The name of a run folder as a label of DNS: lower-case letters, digits and hyphens, a letter first.

    A name that had to be changed ends with a digest, so that those of two run folders are not the same.

    Args:
        name: of the run folder, such as ``quickstart`` or ``quickstart@2``.
        longest: characters of the result, at least 16.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".strip("-")
    if plain == name and len(name) <= longest:
        return name
    return f"{plain[: longest - 7].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def brought(job: Job) -> dict[str, Path]:
    """The files that a job brings to machines with other file systems.

    Returns:
        Their paths as the experiment has them, from its folder → where they are here; the experiment is the first.

    Raises:
        UserError: a plugin is not in the folder of the experiment or below it, or a file is called as the profile is.
    """
    folder = job.experiment.parent
    found = {job.experiment.name: job.experiment}
    for path in job.plugins:
        plugin = Path(os.path.normpath(path))
        if not plugin.is_relative_to(folder):
            raise UserError(
                f"{plugin}: a job of kind {job.profile.kind} brings plugins from the folder of the experiment only "
                f"({folder}); move it there"
            )
        found[str(plugin.relative_to(folder))] = plugin
    if PROFILE in found:
        raise UserError(f"{found[PROFILE]}: the profile of the job is called {PROFILE}; rename this file")
    return found


def submitted(job: Job, job_id: str, log: Path | None = None, address: str = "") -> Launch:
    """The record of a job that was submitted now."""
    return Launch(
        kind=job.profile.kind,
        profile=job.profile.name,
        job_id=job_id,
        host=socket.gethostname(),
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        log=str(log or ""),
        address=address,
    )


def write_files(job: Job, files: Mapping[str, str]) -> None:
    """Write the rendered files and the profile into the job's folder."""
    for name, text in {**files, job.profile_file.name: job.profile.text()}.items():
        write_atomically(job.folder / name, text)


def write_launch(folder: Path, launch: Launch) -> None:
    """Write the record into ``RUN/launch``, and note in the cache that it is ours."""
    write_atomically(folder / RECORD, launch.model_dump_json(indent=1) + "\n")
    write_atomically(_note(launch), "")


def is_own(launch: Launch) -> bool:
    """Whether a record was written from this home folder. Nothing that another one names is called or connected to.

    A record names programs' arguments, addresses and files: in the run folder of somebody else, whatever they like.
    """
    return _note(launch).exists()


def _note(launch: Launch) -> Path:
    return cache_folder("launches", hashlib.sha256(launch.model_dump_json().encode()).hexdigest())


def read_launch(run: Path) -> Launch | None:
    """The record of the latest launch of a run; None if it was not launched.

    Raises:
        UserError: the record cannot be read.
    """
    path = run / FOLDER / RECORD
    try:
        return Launch.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def check_no_secret(files: Mapping[str, str], secrets: Sequence[str]) -> None:
    """Check that no rendered file has the value of an environment variable that is, or may be, a secret.

    Raises:
        UserError: one has; the message has the variable's name only.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and (name in secrets or SECRET.search(name)):
            for file, text in files.items():
                if value in text:
                    raise UserError(
                        f"{file}: would contain the value of {name}; name it under secrets of the profile instead, and "
                        "do not write it, or a ${VARIABLE} that has it, into the profile or the experiment"
                    )
    for file, text in files.items():
        if found := re.search(r"\w+://[^/\s:@]*:[^/\s@]+@", text):
            shown = found.group().partition(":")[0]
            raise UserError(f"{file}: would contain a {shown} URL with a password; take it from a variable")


def check_secrets_are_set(job: Job) -> None:
    """Check that the variables that the job takes from this environment are set.

    Raises:
        UserError: one is not.
    """
    for name in job.profile.secrets:
        if name not in os.environ:
            raise UserError(f"profile {job.profile.name}, secrets: {name} is not set in this environment")


def check_program(program: str, what: str) -> None:
    """Check that a program is on the PATH.

    Raises:
        UserError: it is not.
    """
    if shutil.which(program) is None:
        raise UserError(
            f"{program}: not found on the PATH; {what} is submitted with it. Launch where it is installed, or print "
            "what would be submitted with --render-only"
        )


def call(command: Sequence[str], timeout_s: float = 120.0, given: str | None = None) -> str:
    """The standard output of a command.

    Args:
        command: the program and its arguments.
        timeout_s: when it is given up.
        given: its standard input; None: that of this process.

    Raises:
        UserError: it failed; the message has its words.
    """
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]}: {error}") from error
    if done.returncode:
        words = " ".join((done.stderr.strip() or done.stdout.strip()).split())
        raise UserError(f"{shlex.join(command)}: exit code {done.returncode}: {words[-1000:]}")
    return done.stdout
